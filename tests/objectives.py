"""Objectives on logits given by hand: a model without a body whose head hands its input on.

Every number a test puts in is a logit, so a card's numbers can be checked through the same code that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier import registry
from luthier.columns import chunked
from luthier.kinds import Batch, LossTerm, Now, TokenLoss, TokenWeight, View
from luthier.training.objective import as_term
from tests.conftest import split
from tests.toys.helpers import gap, gradients, rows_of_eight

Logits = Sequence[Sequence[float]]

TUNES: list[Any] = ["half", "lora", "prompt_tuning", {"spiel": {"every": 3, "gather": 1}}]
"""Tunes of several kinds that every objective must go with."""


def view_on(
    logits: Tensor,
    labels: Sequence[int],
    wanted: Sequence[Any],
    /,
    *,
    rows: Sequence[int] | None = None,
    others: Mapping[str, Tensor] | None = None,
    now: Now = Now(),
    **batch: Any,
) -> View:
    """Wanted columns of targets [N] with logits [N, V]; `rows` says which row each target is in, `others` gives other passes' logits."""
    row_N = torch.tensor(rows if rows is not None else [0] * len(labels))
    count = int(row_N.max()) + 1
    position_N = torch.tensor([int((row_N[:i] == row_N[i]).sum()) + 1 for i in range(len(labels))])
    time = int(position_N.max()) + 1
    label_BT = torch.full((count, time), -100)
    label_BT[row_N, position_N] = torch.tensor(labels)
    ids_BT = label_BT.clamp(min=0)
    attend_BT = torch.arange(time)[None] <= (label_BT >= 0).sum(-1)[:, None]
    names = tuple(f"row{i}" for i in range(count))
    columns = chunked.resolve(wanted)
    flows = {one.name: one.gradient for one in chunked.passes_of(columns)}
    found = chunked.compute(
        logits,
        torch.tensor(labels),
        lambda hidden: hidden,
        columns,
        key_N=torch.arange(len(labels)),
        others={name: chunked.Other(one, torch.clone, flows.get(name, False)) for name, one in (others or {}).items()},
        vocabulary=logits.shape[1],
    )
    made = Batch(ids_BT, attend_BT, torch.arange(time).expand(count, -1), label_BT, names, **batch)
    return View(made, found, label_N=torch.tensor(labels), row_N=row_N, position_N=position_N, now=now)


def total_of(objective: Any, logits: Tensor, labels: Sequence[int], *, weight: Any = None, **more: Any) -> Tensor:
    """The loss of an objective, divided by its units, with a token weight if given."""
    values = [value for part in registry.make_all(objective, "objective") for value in part.values]
    weights = [value for part in registry.make_all(weight, "token_weight") for value in part.values] if weight else []
    terms = [as_term(value) for value in values if isinstance(value, LossTerm | TokenLoss)]
    weights += [value for value in values if isinstance(value, TokenWeight)]
    wanted = ["nll", *(column for one in (*terms, *weights) for column in one.columns)]
    view = view_on(logits, labels, wanted, **more)
    weight_N = torch.ones(len(labels), dtype=logits.dtype)
    targets = float(len(labels))
    for one in weights:
        assert one.weigh is not None
        weight_N = weight_N * one.weigh(view).detach()
        targets = float(one.count(view.batch).sum()) if one.count is not None else targets
    loss = logits.new_zeros(())
    for term in terms:
        counted = term.count(view.batch) if term.count is not None else None
        rows = float(len(view.row_N[weight_N != 0].unique()))
        unit = counted if counted is not None else {"token": targets, "row": rows, "step": 1.0}[term.unit]
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


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Made-up logits in fp64 that ask for a gradient."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def assert_slopes(objective: Any, labels: Sequence[int], vocabulary: int = 5, **more: Any) -> None:
    """The gradient is that of finite differences."""
    logits = drawn(len(labels), vocabulary)
    assert torch.autograd.gradcheck(lambda one: total_of(objective, one, labels, **more), (logits,), atol=1e-7)


def differences(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Slopes of a function of logits [N, V], by finite differences: an oracle for losses that hold part of themselves fixed."""
    point, found, step = logits.detach(), torch.zeros_like(logits), 1e-5
    for index in range(point.numel()):
        away = torch.zeros_like(point)
        away.view(-1)[index] = step
        found.view(-1)[index] = (function(point + away) - function(point - away)) / (2 * step)
    return found.detach()


def assert_trains(engine: Any, now: Now, tune: Any, objective: Any, token_weight: Any = None) -> None:
    """Two steps with a tune move it at finite losses, and any split of a batch then gives the same gradient."""
    run = engine(tune, objective=objective, token_weight=token_weight)
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    batches = split(rows_of_eight(), (5, 3))
    losses = [run.step(batches, now._replace(step=i)).loss for i in range(2)]
    assert all(abs(loss) < 1e3 for loss in losses) and losses[0] != losses[1]
    assert any(n not in before or not torch.equal(one.master, before[n]) for n, one in run.tune.trained.items())
    found = [gradients(run, split(rows_of_eight(), sizes), now._replace(step=2)) for sizes in ((8,), (2, 0, 5, 1))]
    assert any(bool(one.abs().max() > 0) for one in found[0].values())
    assert gap(found[1], found[0]) < 1e-10


def assert_idle(engine: Any, now: Now, objective: Any, token_weight: Any = None) -> None:
    """A row without targets adds nothing, and neither does what stands behind the last target; rows without any make no step."""
    run, batch = engine(objective=objective, token_weight=token_weight), rows_of_eight()
    whole = gradients(run, [batch], now)
    alone = batch.take((batch.label_BT >= 0).any(-1).nonzero()[:, 0])
    assert len(alone.row_ids) == 7 and gap(gradients(run, [alone], now), whole) < 1e-12
    label_BT = batch.label_BT.clone()
    last_B = batch.attend_BT.sum(-1) - 1
    label_BT[torch.arange(8), last_B] = -100
    ids_BT = batch.token_ids_BT.clone()
    ids_BT[torch.arange(8), last_B] = 7
    cut, other = batch._replace(label_BT=label_BT), batch._replace(label_BT=label_BT, token_ids_BT=ids_BT)
    assert gap(gradients(run, [other], now), gradients(run, [cut], now)) == 0.0
    nothing = run.step([batch._replace(label_BT=torch.full_like(label_BT, -100))], now)
    assert nothing.skipped and nothing.loss == 0.0
