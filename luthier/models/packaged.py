"""The models that come with luthier, and one more of their kind that is built on demand."""

from __future__ import annotations

from pathlib import Path

from luthier.models.wheel import cache_folder

PACKAGED = ("workshop", "workshop-small")
"""In the package itself."""
BUILT = ("workshop-large",)
"""Built on demand into the cache."""


def folder_of(name: str) -> Path:
    """Where a model of this name is, or will be once it is built."""
    return Path(__file__).with_name("packaged") / name if name in PACKAGED else cache_folder() / name
