"""A toy transform: nothing moves along the start weight's largest singular direction."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import GradientTransform, Now, State, TrainedLike
from luthier.registry import method


@method(title="Project out")
def project_out(*, directions: int = 1) -> GradientTransform:
    """Take out of every value its components along the largest left singular vectors of the weight at the start.

    Args:
        directions: how many.
    """

    def takes(trained: TrainedLike) -> bool:
        return trained.form == "whole" and trained.master.ndim == 2

    def init(trained: TrainedLike) -> State:
        values = trained.master.detach()
        left_OK = torch.linalg.svd(values.to(torch.promote_types(values.dtype, torch.float32)), full_matrices=False)[0]
        return {"guard_OK": left_OK[:, :directions].clone()}

    def update(value: Tensor, state: State, trained: TrainedLike, now: Now) -> Tensor:
        guard_OK: Tensor = state["guard_OK"]
        return value - guard_OK @ (guard_OK.T @ value)

    return GradientTransform(init, update, takes=takes)
