"""Objectives on logits given by hand: a model without a body whose head hands its input on.

Every number a test puts in is a logit, so a card's numbers can be checked through the same code that trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier import logprobs, registry
from luthier.kinds import OBJECTIVES, Batch, Now, Term, TokenLoss, TokenWeight, View
from luthier.training.objective import as_term

Logits = Sequence[Sequence[float]]


def view_on(
    logits: Tensor,
    labels: Sequence[int],
    columns: Sequence[Any],
    /,
    *,
    rows: Sequence[int] | None = None,
    others: Mapping[str, Tensor] | None = None,
    now: Now = Now(),
    **batch: Any,
) -> View:
    """Columns of targets [N] with logits [N, V]; `rows` says which row each target is in, `others` gives other passes' logits."""
    row_N = torch.tensor(rows if rows is not None else [0] * len(labels))
    count = int(row_N.max()) + 1
    position_N = torch.tensor([int((row_N[:i] == row_N[i]).sum()) + 1 for i in range(len(labels))])
    time = int(position_N.max()) + 1
    label_BT = torch.full((count, time), -100)
    label_BT[row_N, position_N] = torch.tensor(labels)
    ids_BT = label_BT.clamp(min=0)
    attend_BT = torch.arange(time)[None] <= (label_BT >= 0).sum(-1)[:, None]
    names = tuple(f"row{i}" for i in range(count))
    found = logprobs.compute(
        logits,
        torch.tensor(labels),
        lambda hidden: hidden,
        logprobs.resolve(columns),
        key_N=torch.arange(len(labels)),
        others={name: logprobs.Other(one, lambda hidden: hidden, one.requires_grad) for name, one in (others or {}).items()},
        vocabulary=logits.shape[1],
    )
    made = Batch(ids_BT, attend_BT, torch.arange(time).expand(count, -1), label_BT, names, **batch)
    return View(made, found, label_N=torch.tensor(labels), row_N=row_N, position_N=position_N, now=now)


def total_of(objective: Any, logits: Tensor, labels: Sequence[int], *, weight: Any = None, **more: Any) -> Tensor:
    """The loss of an objective, divided by its units, with a token weight if given."""
    values = [value for part in registry.make_all(objective, OBJECTIVES) for value in part.values]
    weights = [value for part in registry.make_all(weight, ("token_weight",)) for value in part.values] if weight else []
    terms = [as_term(value) for value in values if isinstance(value, Term | TokenLoss)]
    weights += [value for value in values if isinstance(value, TokenWeight)]
    columns = ["nll", *(column for one in (*terms, *weights) for column in one.columns)]
    view = view_on(logits, labels, columns, **more)
    weight_N = torch.ones(len(labels), dtype=logits.dtype)
    for one in weights:
        assert one.weigh is not None
        weight_N = weight_N * one.weigh(view).detach()
    loss = logits.new_zeros(())
    for term in terms:
        counted = term.count(view.batch) if term.count is not None else None
        rows = float(len(view.row_N.unique()))
        unit = counted if counted is not None else {"token": float(len(labels)), "row": rows, "step": 1.0}[term.unit]
        units = torch.tensor(unit if isinstance(unit, tuple) else (unit,), dtype=logits.dtype)
        loss = loss + term.weight * (term.total(view.for_technique({}, weight_N), {}).reshape(-1) / units).sum()
    return loss


def loss_of(objective: Any, logits: Logits, labels: Sequence[int], **more: Any) -> float:
    """The loss as a number."""
    return float(total_of(objective, torch.tensor(logits, dtype=torch.float64), labels, **more))


def gradient_of(objective: Any, logits: Logits, labels: Sequence[int], **more: Any) -> list[list[float]]:
    """The loss's gradient by the logits."""
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(total_of(objective, leaf, labels, **more), leaf)
    return gradient.tolist()  # type: ignore[no-any-return]
