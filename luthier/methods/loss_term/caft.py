"""Concept-Aware Fine-Tuning (Chen et al., 2025), section 3: heads that predict later tokens train beside the next-token loss.

The schedules and their coefficients follow the authors' code (michaelchen-lab/caft-llm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, Freezing, LossTerm, Now, Services, State, Tensors, TrainedLike, View
from luthier.methods.loss_term._heads import MAKES, loss_ahead, start_heads, targets_ahead
from luthier.methods.loss_term.cross_entropy import cross_entropy
from luthier.registry import method

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "sine": lambda progress: math.sin(math.pi / 2 * progress),
    "reverse_sine": lambda progress: math.sin(math.pi / 2 * (1.0 - progress)),
}
"""From progress, 0 to 1, to what the heads' losses are multiplied with."""


@method(
    title="Concept-Aware Fine-Tuning",
    paper="arXiv:2506.07833",
    row=11,
    reduces_to="weight 0 and heads_first 0: plain cross-entropy",
    departs="the default heads are the authors' smaller ones, with a bias that is zero too, so that they start as the identity; heads "
    "learn from the run's own rows and always read the last hidden state, where the authors first train them on text that the base "
    "wrote, on the state one block earlier; a head's loss is a mean over its labels of the whole step, not of a micro-batch; the "
    "schedule runs over the steps in which the model trains; a token weight that leaves labels out makes the heads' part smaller by as "
    "much",
    replication="caft",
)
def caft(
    *,
    heads: int = 4,
    head: Literal["residual", "block"] = "residual",
    weight: float = 0.01,
    decay: float = 0.8,
    schedule: Literal["constant", "linear", "sine", "reverse_sine"] = "reverse_sine",
    over: float = 1.0,
    heads_first: float = 1 / 6,
    train_heads: bool = False,
    head_learning_rate_factor: float = 10.0,
) -> tuple[LossTerm, LossTerm, Freezing]:
    """Also predict the tokens behind the next one, with a head for each that is thrown away, to learn phrases of several tokens.

    It brings the cross-entropy along: use `objective: caft`. First the heads learn alone, then the model learns through them, and the
    learning rate schedule begins anew. Each head costs one more pass of the model's output matrix over the labels. The run's result
    has no heads.

    Args:
        heads: n, heads for the tokens at t + 2 to t + n + 1; the paper's 4.
        head: what a head is. `residual`: x + SiLU(W x + b) with the width of the model, which starts as the identity. `block`: a copy of
            the last block but one, as in the paper; it trains as many parameters as that, and sees neither prompts nor prefixes.
        weight: c, multiplies the heads' losses while the model trains; the paper's 0.01.
        decay: d, head i counts d ** i; the paper's 0.8.
        schedule: how the weight changes while the model trains: it rises from 0 (`linear`, `sine`), falls to 0 (`reverse_sine`), or
            is `constant`.
        over: share of these steps in which it changes; behind it the weight stays. `sine` over 0.2 is the authors' `sine_0.2`.
        heads_first: share of the run's steps in which the heads alone train, with weight 1 throughout; the paper's one epoch for the
            heads and five for the model. 0 leaves them as they start, unless `train_heads`.
        train_heads: let the heads go on while the model trains; frozen in the paper.
        head_learning_rate_factor: multiplies the learning rate of the heads; the paper has 1e-4 for them and 1e-5 for the model.

    Raises:
        LuthierError: an option is out of its range.
    """
    _refuse(heads, weight, decay, over, heads_first, head_learning_rate_factor)
    every, make = range(1, heads + 1), MAKES[head]

    def start(services: Services) -> Tensors:
        return start_heads(make, heads, services)

    def count(batch: Batch) -> tuple[float, ...]:
        return tuple(targets_ahead(batch, i) for i in every)

    def total(view: View, own: Tensors) -> Tensor:
        scale = 1.0 if learns_alone(view.now) else weight * strength(view.now, schedule, heads_first, over)
        if not scale:
            return view["nll"].new_zeros(heads)
        return torch.stack([loss_ahead(make, view, own, i) * (scale * decay**i) for i in every])

    def learns_alone(now: Now) -> bool:
        return now.step < _begin(now, heads_first)

    def frozen(trained: TrainedLike, state: State, now: Now) -> bool:
        return not (train_heads or learns_alone(now))

    ends = (heads_first,) if heads_first else ()
    return (
        cross_entropy(),
        LossTerm(total, count=count, start=start, hidden=True, rate=head_learning_rate_factor),
        Freezing(frozen, ends=ends, restart=True, alone=frozenset({0} if ends else ())),
    )


def strength(now: Now, schedule: str, heads_first: float = 0.0, over: float = 1.0) -> float:
    """What a schedule comes to in this step, of those in which the model trains."""
    begin = _begin(now, heads_first)
    return SCHEDULES[schedule](min(1.0, (now.step - begin) / (over * (now.steps - begin))))


def _begin(now: Now, heads_first: float) -> int:
    """The step in which the model begins to train."""
    return round(heads_first * now.steps)


def _refuse(heads: int, weight: float, decay: float, over: float, heads_first: float, head_learning_rate_factor: float) -> None:
    for name, value, fits, fix in (
        ("heads", heads, heads >= 1, "use 1 or more"),
        ("weight", weight, weight >= 0.0, "use 0 or more"),
        ("decay", decay, 0.0 < decay <= 1.0, "use more than 0 and at most 1"),
        ("over", over, 0.0 < over <= 1.0, "use more than 0 and at most 1"),
        ("heads_first", heads_first, 0.0 <= heads_first < 1.0, "use 0 or more and less than 1"),
        ("head_learning_rate_factor", head_learning_rate_factor, head_learning_rate_factor > 0.0, "use more than 0"),
    ):
        if not fits:
            raise LuthierError(f"`{name}` is {value}", where=f"caft: {name}", fix=fix)
