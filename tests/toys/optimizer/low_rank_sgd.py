"""A toy optimizer for matrices: SGD in the gradient's largest directions (Zhao et al., 2024, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import Now, Optimizer, State, TrainedLike
from luthier.registry import method


@method(title="Low-rank SGD")
def low_rank_sgd(*, rank: int = 4, every: int = 2) -> Optimizer:
    """Project each gradient on a few directions, which are found anew now and then.

    Args:
        rank: R, how many.
        every: steps from one search to the next.
    """

    def takes(trained: TrainedLike) -> bool:
        return trained.master.ndim == 2

    def step(value: Tensor, gradient: Tensor, state: State, trained: TrainedLike, now: Now) -> None:
        if "basis_OR" not in state or now.step % every == 0:
            basis_OR = torch.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
            # A checkpoint keeps numbers, not how they lie in memory, by which products round.
            state["basis_OR"] = basis_OR.clone(memory_format=torch.contiguous_format)
        basis_OR = state["basis_OR"]
        value.sub_(basis_OR @ (basis_OR.T @ gradient) * (now.learning_rate * trained.rate))

    return Optimizer(lambda trained: {}, step, takes)
