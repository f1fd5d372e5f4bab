"""Gradient clipping by the norm of all gradients together (Pascanu et al., 2013), algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import GradientTransform, Now, State, TrainedLike
from luthier.registry import method


@method(title="Gradient clipping", paper="arXiv:1211.5063", reduces_to="norm 0 or none: no clipping")
def clip(*, norm: float | None = 1.0) -> GradientTransform:
    """Scale all gradients down together when their joint norm is above a limit.

    Args:
        norm: the limit; 0 or none is off, for optimizers that take the size out of gradients themselves.
    """
    if norm is not None and norm < 0:
        raise LuthierError(f"the norm is {norm}", where="clip: norm", fix="use a limit above 0, or 0 for none")

    def update(values: Sequence[Tensor], states: Sequence[State], trained: Sequence[TrainedLike], now: Now) -> list[Tensor]:
        if not norm:
            return list(values)
        joint = torch.stack([value.norm(dtype=torch.promote_types(value.dtype, torch.float32)) for value in values]).norm()
        for state in states[:1]:
            state["norm"] = float(joint)
        factor = norm / (joint + 1e-6)
        return [value.mul_(factor) for value in values] if factor < 1 else list(values)

    return GradientTransform(lambda trained: {}, update, scope="all")
