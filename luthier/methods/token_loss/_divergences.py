"""What f-divergences make of supervised fine-tuning: a loss of the implicit reward, phi(r) = f*(-r) with the convex conjugate f*.

The implicit reward is r = beta * log(p / p_base). Every phi has phi(0) = 0 and the slope -1 there, which is supervised fine-tuning's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import View

HELLINGER_END = -0.9
"""Below this reward the Hellinger loss is a straight line: it has a pole at -1, and there the weight would grow without bound."""

Name = Literal["linear", "chi2", "chi2_unclipped", "hellinger"]


class Divergence(NamedTuple):
    """One f-divergence."""

    phi: Callable[[Tensor], Tensor]
    """The loss of a reward."""
    weight: Callable[[Tensor], Tensor]
    """How much of the gradient of supervised fine-tuning is left at a reward: -phi'(r)."""


def _hellinger(reward: Tensor) -> Tensor:
    inside = reward.clamp(min=HELLINGER_END)
    return -inside / (1.0 + inside) - (reward - inside) / (1.0 + HELLINGER_END) ** 2


DIVERGENCES: Mapping[str, Divergence] = {
    "linear": Divergence(lambda r: -r, torch.ones_like),
    "chi2": Divergence(lambda r: _parabola(r.clamp(max=2.0)), lambda r: (1.0 - r / 2.0).clamp(min=0.0)),
    "chi2_unclipped": Divergence(lambda r: _parabola(r), lambda r: 1.0 - r / 2.0),
    "hellinger": Divergence(_hellinger, lambda r: (1.0 + r.clamp(min=HELLINGER_END)) ** -2),
}
"""By name. `linear`: total variation. `chi2`: Pearson's, f(u) = (u - 1)^2 over u >= 0. `chi2_unclipped`: over all u. `hellinger`: the
squared one, f(u) = (sqrt(u) - 1)^2."""


def _parabola(reward: Tensor) -> Tensor:
    return reward.square() / 4.0 - reward


def note_stopped(view: View, weight_N: Tensor) -> None:
    """Log the share of the labels that are learned no more, or unlearned."""
    view.note("weight 0 or below", (weight_N <= 0.0).to(weight_N.dtype))


def check_beta(name: str, beta: float) -> None:
    """Refuse a scale of the reward at which nothing is learned.

    Raises:
        LuthierError: it is not above 0.
    """
    if beta <= 0.0:
        raise LuthierError(f"`beta` is {beta}", where=f"{name}: beta", fix="use more than 0")
