"""A toy transform: keep only the sign."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import GradientTransform, Now, State, TrainedLike
from luthier.registry import method


@method(title="Sign")
def sign() -> GradientTransform:
    """Replace every value with its sign."""

    def update(value: Tensor, state: State, trained: TrainedLike, now: Now) -> Tensor:
        return value.sign()

    return GradientTransform(lambda trained: {}, update)
