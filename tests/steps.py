"""Rules over the whole step on losses given by hand, through the code that looks, counts units and divides; and runs of two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from luthier import registry
from luthier.columns.targets import find_targets
from luthier.kinds import Batch, Now, TokenWeight, View
from luthier.registry import Part
from luthier.rows.batches import collate
from luthier.rows.encode import Encoded
from luthier.training import objective, rules
from luthier.training.objective import Minimized, Objective, Weighted, as_term
from luthier.training.world import World
from tests.conftest import split
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight

TUNES: tuple[Any, ...] = ("half", "lora", "prompt_tuning", {"spiel": {"every": 3, "gather": 1}})


class Given(NamedTuple):
    """A row by what its targets cost."""

    nll: Sequence[float]
    free: Mapping[str, str | float] = {}
    """Its free columns."""
    entropy: Sequence[float] = ()
    positions: Sequence[int] = ()
    """Where its targets stand; one behind the other if empty."""


class Stepped(NamedTuple):
    """What a step came to."""

    loss: float
    slopes: dict[str, list[float]]
    """The loss's gradient by each target's loss, by row; rows that were not run are not there."""
    notes: dict[str, float]
    passes: int
    """Passes over micro-batches that the rule took."""


def step_on(rows: Mapping[str, Given], weight: Any, sizes: Sequence[int] = (), *, state: dict[str, Any] | None = None) -> Stepped:
    """The loss of cross-entropy under one or several token weights, for rows in micro-batches of these sizes, else all in one."""
    leaves = {name: torch.tensor(row.nll, dtype=torch.float64, requires_grad=True) for name, row in rows.items()}
    ends = list(accumulate(sizes or (len(rows),), initial=0))
    batches = [_batch(dict(list(rows.items())[first:last])) for first, last in pairwise(ends)]
    passes: list[Batch] = []

    def view(tune: Any, batch: Batch, columns: Any, now: Now, **more: Any) -> View:
        passes.append(batch)
        where = find_targets(batch)
        each = {
            "nll": torch.cat([leaves[name] for name in batch.row_ids]),
            "entropy": torch.tensor(
                [value for name in batch.row_ids for value in rows[name].entropy or [0.0] * len(rows[name].nll)]
            ),
        }
        return View(batch, each, label_N=where.label_N, row_N=where.row_N, position_N=where.source_N + 1, now=now)

    made = [one if isinstance(one, Part) else registry.make(one, ("token_weight",)) for one in _list(weight)]
    weights = [Weighted(part.name, value, state or {}) for part in made for value in part.values if isinstance(value, TokenWeight)]
    ((plain,),) = [one.values for one in registry.make_all("cross_entropy", "objective")]
    goal = Objective([Minimized("cross_entropy", as_term(plain), {})], weights)

    def services(slot: str) -> Any:
        return SimpleNamespace(now=Now())

    tune: Any = SimpleNamespace(model=nn.Identity())
    with mock.patch.object(objective, "view_of", view), mock.patch.object(rules, "view_of", view):
        looked = goal.look(tune, batches, Now(), World(), services)
        assert looked is not None
        taken = len(passes)
        units = goal.units(looked.batches, looked.keeps, World())
        loss = torch.zeros((), dtype=torch.float64)
        for i, (batch, keep_N) in enumerate(zip(looked.batches, looked.keeps, strict=True)):
            loss = loss + goal.total(tune, batch, units, Now(), first=i == 0, keep_N=keep_N, services_of=services).loss
    ran = [name for batch in looked.batches for name in batch.row_ids]
    found = torch.autograd.grad(loss, [leaves[name] for name in ran]) if ran else ()
    return Stepped(float(loss.detach()), dict(zip(ran, (one.tolist() for one in found), strict=True)), looked.notes, taken)


def _list(weight: Any) -> list[Any]:
    return weight if isinstance(weight, list) else [weight]


def _batch(rows: Mapping[str, Given]) -> Batch:
    places = {name: list(row.positions) or list(range(1, len(row.nll) + 1)) for name, row in rows.items()}
    time = max([1, *(max(place, default=0) + 1 for place in places.values())])
    label_BT = torch.full((len(rows), time), -100)
    attend_BT = torch.zeros(len(rows), time, dtype=torch.bool)
    for i, place in enumerate(places.values()):
        label_BT[i, place] = 1
        attend_BT[i, : max(place, default=0) + 1] = True
    made = collate([Encoded(name, (1,), (False,), "", row.free, 0, "") for name, row in rows.items()]) if rows else None
    numbers, texts = ({}, {}) if made is None else (made.columns, made.texts)
    position_BT = torch.arange(time).expand(len(rows), -1)
    return Batch(label_BT.clamp(min=0), attend_BT, position_BT, label_BT, tuple(rows), numbers, texts)


def assert_trains(engine: Any, now: Now, batch: Batch | None = None, **setting: Any) -> None:
    """Two steps have finite losses, and another split of the batch gives the same gradient."""
    batch = rows_of_eight() if batch is None else batch
    found: list[dict[str, Tensor]] = []
    for sizes in ((8,), (3, 1, 4, 0)):
        run = engine(**{"optimizer": "adamw", **setting, "model": model_of()})
        run.tune.model.train()
        losses = [run.step(split(batch, (8,)), now._replace(step=i, learning_rate=0.01)).loss for i in range(2)]
        assert all(loss == loss and 0.0 < loss < 1e3 for loss in losses)
        found.append(gradients(run, split(batch, sizes), now._replace(step=2)))
    assert gap(found[1], found[0]) < 1e-9 and found[0]
