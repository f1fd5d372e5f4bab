"""A toy edit that brings a transform of its own gradients along."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import GradientTransform, Now, Place, RepresentationEdit, Services, State, Tensors, TrainedLike
from luthier.registry import method


@method(title="Signs of its own", merges="never", learning_rate=1e-3)
def own_signs(*, past: float = 0.5) -> tuple[RepresentationEdit, GradientTransform]:
    """Shift what every block gives, by the running mean of its gradients' signs.

    Args:
        past: how much of the mean stays at each step.
    """

    def start(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
        return {"shift": torch.zeros(width_out)}

    def apply(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return y + tensors["shift"]

    def init(trained: TrainedLike) -> State:
        wide = torch.promote_types(trained.master.dtype, torch.float32)
        return {"sign": torch.zeros_like(trained.master.detach(), dtype=wide)}

    def update(value: Tensor, state: State, trained: TrainedLike, now: Now) -> Tensor:
        state["sign"].lerp_(value.sign().to(state["sign"]), 1.0 - past)
        return state["sign"].to(value)

    return RepresentationEdit(start, apply, ("block",)), GradientTransform(init, update)
