"""Losses of a whole step: made of every row's numbers at once, whatever micro-batches and processes the rows are in.

One pass without gradients makes the numbers; the loss of all of them has a gradient by each, and every micro-batch's backward pass goes on
from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier import machine
from luthier.kinds import Batch, LossTerm, Now, Reference, RowTable, StepLoss, Tensors, View
from luthier.training.world import World


class Slopes(NamedTuple):
    """The gradient of a step's loss by each row's numbers, and what is missing to the loss itself."""

    of_row: dict[str, Tensor]
    rest: float
    """Of this process."""


def as_term(value: StepLoss, reference: Reference) -> LossTerm:
    """The term of which a loss of the whole step is counted and told. Its sum over a micro-batch is `part`."""
    columns = (*value.columns, *(reference.columns if value.reference else ()))
    checks = [value.check, reference.check if value.reference else None]

    def total(view: View, own: Tensors) -> Tensor:
        raise RuntimeError("a loss of the whole step has no sum over a micro-batch")

    def count(batch: Batch) -> float:
        groups, rows = _taking_part(value, batch)
        # What is of the step alone counts its rows and is multiplied with them: they are there once, whatever the split.
        return float(len(groups) if value.unit == "group" else len(rows))

    def check(batch: Batch) -> None:
        for one in checks:
            if one is not None:
                one(batch)

    return LossTerm(
        total,
        unit="group",
        count=count,
        columns=columns,
        weight=value.weight,
        check=check,
        routers=value.routers,
        penalty=value.penalty,
    )


def _taking_part(value: StepLoss, batch: Batch) -> tuple[tuple[tuple[int, ...], ...], list[int]]:
    """The groups and rows that a loss is made of."""
    if not value.columns:
        return batch.groups, list(range(len(batch.row_ids)))
    targets = batch.own().targets_by_row().tolist()
    groups = batch.learnt_groups()
    alone = set(range(len(targets))) - {place for group in batch.groups for place in group}
    return groups, sorted({place for group in groups for place in group} | {place for place in alone if targets[place]})


def value_of(value: StepLoss, view: View, own: Tensors, reference: Reference) -> Tensor:
    """What a loss makes of the rows of a micro-batch, [B, ...].

    Args:
        value: the loss.
        view: of the rows' own labels.
        own: its trained tensors.
        reference: what answers are compared with, if it asks for that.
    """
    if value.reference:
        view.reference_B = reference.read(view).detach()
    return value.value(view, own)


def slopes_of(value: StepLoss, found: Sequence[tuple[Batch, Tensor]], now: Now, world: World) -> Slopes:
    """The gradient of the step's loss by each row's numbers.

    Args:
        value: the loss.
        found: the micro-batches of this process, with what `value_of` made of their rows.
        now: the clock.
        world: the processes.
    """
    mine = [one for batch, numbers in found for one in _rows(value, batch, numbers.cpu())]
    groups = [
        tuple(batch.row_ids[place] for place in group)
        for batch, _ in found
        for group in _taking_part(value, batch)[0]
        if batch.groups
    ]
    everyones = world.gather_plain(mine)
    # What is missing to the loss is told by every process that runs a micro-batch, whether or not its rows take part.
    telling = sum(world.gather_plain(bool(found)))
    rows = sorted((one for some in everyones for one in some), key=lambda one: str(one["id"]))
    if not rows:
        return Slopes({}, 0.0)
    place = {one["id"]: number for number, one in enumerate(rows)}
    together = sorted(tuple(place[id] for id in group) for some in world.gather_plain(groups) for group in some)
    names = sorted({name for one in rows for name in one["columns"]})
    nan = float("nan")
    columns = {name: torch.tensor([one["columns"].get(name, nan) for one in rows], dtype=torch.float64) for name in names}
    leaf = torch.stack([machine.widened(one["value"]) for one in rows]).requires_grad_(True)
    with torch.enable_grad():
        loss = value.loss(RowTable(leaf, tuple(together), columns, now)) * (len(rows) if value.unit == "step" else 1)
        (slope,) = torch.autograd.grad(loss, leaf)
    rest = (loss.item() - (slope * leaf).sum().item()) / telling
    return Slopes({id: slope[number] for id, number in place.items()}, rest)


def _rows(value: StepLoss, batch: Batch, numbers: Tensor) -> list[dict[str, Any]]:
    columns = {name: column.tolist() for name, column in batch.columns.items()}
    return [
        {"id": batch.row_ids[place], "value": numbers[place], "columns": {name: column[place] for name, column in columns.items()}}
        for place in _taking_part(value, batch)[1]
    ]


def part(slopes: Slopes, view: View, numbers: Tensor, *, first: bool) -> Tensor:
    """A micro-batch's part of the loss: its gradient is right, and all parts together are the loss."""
    nothing = torch.zeros_like(numbers[0])
    slope = torch.stack([slopes.of_row.get(id, nothing).to(numbers) for id in view.batch.row_ids])
    return (slope * numbers).sum() + (slopes.rest if first else 0.0)
