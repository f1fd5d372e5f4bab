"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, 2017), algorithm 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from luthier.errors import LuthierError
from luthier.kinds import Now, Optimizer, Seen, State, TrainedLike
from luthier.registry import method


@method(title="AdamW", paper="arXiv:1711.05101", reduces_to="weight_decay 0: Adam")
def adamw(*, weight_decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> Optimizer:
    """Adam with weight decay taken off the weights directly; norms, biases and other vectors do not decay.

    Args:
        weight_decay: weight decay, multiplied with the learning rate; 0, since fine-tuning starts from weights worth keeping.
        beta1: decay of the first moment, as in the paper.
        beta2: decay of the second moment, as in the paper.
        epsilon: added to the root of the second moment, as in the paper.
    """
    for name, value in {"beta1": beta1, "beta2": beta2}.items():
        if not 0.0 <= value < 1.0:
            raise LuthierError(f"{name} is {value}", where=f"adamw: {name}", fix="use 0 to below 1")
    if weight_decay < 0.0:
        raise LuthierError(f"the weight decay is {weight_decay}", where="adamw: weight_decay", fix="use 0 or more")
    if epsilon <= 0.0:
        raise LuthierError(f"epsilon is {epsilon}", where="adamw: epsilon", fix="use more than 0, e.g. 1e-8")

    def init(trained: TrainedLike) -> State:
        values = trained.master
        wide = torch.promote_types(values.dtype, torch.float32)
        state: State = {"first": torch.zeros_like(values, dtype=wide), "second": torch.zeros_like(values, dtype=wide)}
        shape = [1] * values.ndim
        if trained.changes:
            # Numbers that join later are younger: with one shared age their first step would be too long.
            shape[trained.axis] = values.shape[trained.axis]
        state["age"] = torch.zeros(shape if trained.changes else (), dtype=torch.float32, device=values.device)
        return state

    def step(value: Tensor, gradient: Tensor, state: State, trained: TrainedLike, now: Now) -> None:
        rate = now.learning_rate * trained.rate
        decay = weight_decay if trained.decay else 0.0
        if decay and trained.anchor is not None:
            value.lerp_(trained.anchor.to(value.dtype), rate * decay)
            decay = 0.0
        if not trained.changes:
            fused_adamw(
                [value],
                [gradient],
                [state["first"]],
                [state["second"]],
                [],
                [state["age"]],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=rate,
                weight_decay=decay,
                eps=epsilon,
                maximize=False,
            )
            return
        age = state["age"].add_(1)
        state["first"].lerp_(gradient, 1 - beta1)
        state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["second"] / _correction(beta2, age, gradient.dtype)).sqrt_().add_(epsilon)
        value.mul_(1 - rate * decay)
        value.sub_(rate * (state["first"] / _correction(beta1, age, gradient.dtype)) / root)

    def seed(state: State, is_new: Tensor, seen: Seen) -> None:
        # Corrected at this age, the moments are just what was seen.
        age = torch.full_like(state["age"], seen.steps)
        first = seen.mean * _correction(beta1, age, seen.mean.dtype)
        second = seen.square * _correction(beta2, age, seen.square.dtype)
        state["first"] = torch.where(is_new, first.to(state["first"].dtype), state["first"])
        state["second"] = torch.where(is_new, second.to(state["second"].dtype), state["second"])
        state["age"] = torch.where(_newcomers(is_new, state["age"]), age, state["age"])

    return Optimizer(init, step, seed=seed)


def _newcomers(is_new: Tensor, age: Tensor) -> Tensor:
    """The mask in the shape of ages: one for each entry along the axis in which entries come and go."""
    for axis, size in enumerate(age.shape):
        if size == 1:
            is_new = is_new.any(axis, keepdim=True)
    return is_new


def _correction(beta: float, age: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - beta^age; fp32 would lose digits in the difference while the age is small."""
    return -torch.expm1(age.to(dtype) * math.log(beta)) if beta else torch.ones_like(age, dtype=dtype)
