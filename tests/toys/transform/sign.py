"""A toy transform: keep only the sign."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import Now, State, TrainedLike, Transform
from luthier.registry import method


@method(title="Sign")
def sign() -> Transform:
    """Replace every value with its sign."""

    def update(value: Tensor, state: State, trained: TrainedLike, now: Now) -> Tensor:
        return value.sign()

    return Transform(lambda trained: {}, update)
