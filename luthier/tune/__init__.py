"""The owner of shared work for everything that trains: attach, tap, swap, refresh, merge."""

from luthier.tune.trained import Trained
from luthier.tune.tune import Tune

__all__ = ["Trained", "Tune"]
