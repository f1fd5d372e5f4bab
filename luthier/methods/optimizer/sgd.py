"""Stochastic gradient descent with momentum (Polyak, 1964), in the form that adds the learning rate outside the momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Now, Optimizer, State, TrainedLike
from luthier.registry import method


@method(title="SGD", reduces_to="momentum 0: value - learning rate x gradient")
def sgd(*, momentum: float = 0.0) -> Optimizer:
    """Step against the gradient, or against its running sum.

    Args:
        momentum: share of the last step's direction that is kept; 0 keeps no state.
    """
    if not 0.0 <= momentum < 1.0:
        raise LuthierError(f"the momentum is {momentum}", where="sgd: momentum", fix="use 0 to below 1")

    def init(trained: TrainedLike) -> State:
        return {"velocity": torch.zeros_like(trained.master)} if momentum else {}

    def step(value: Tensor, gradient: Tensor, state: State, trained: TrainedLike, now: Now) -> None:
        direction = state["velocity"].mul_(momentum).add_(gradient) if momentum else gradient
        value.sub_(direction * (now.learning_rate * trained.rate))

    return Optimizer(init, step)
