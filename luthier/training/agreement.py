"""Whether all processes train the same numbers. Each chooses for itself from what all of them see, which comes out alike as long as
devices compute alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError
from luthier.models.sharding import is_sharded
from luthier.training.world import World
from luthier.tune import Trained, Tune


def check(world: World, tune: Tune, *, values: bool) -> None:
    """Stop in all processes where they would train different numbers.

    Args:
        world: the processes.
        tune: what trains here.
        values: compare what the numbers are, too, and not only which stand still.

    Raises:
        LuthierError: the processes differ.
    """
    if world.size == 1:
        return
    everyone = world.gather_plain(_choices(tune.trained.values(), values=values))
    slots = {slot for one in everyone for slot in one}
    apart = sorted(slot for slot in slots if len({one.get(slot) for one in everyone}) > 1)
    if apart:
        raise LuthierError(
            f"`{apart[0]}` trains numbers that differ between the processes",
            where=apart[0],
            fix="use one process, or another technique: what it chooses is not the same on every device",
        )


def _choices(trained: Iterable[Trained], *, values: bool) -> dict[str, str]:
    """A short name for what each technique has chosen to train, by slot: equal where the choice is.

    Args:
        trained: what trains.
        values: with the numbers themselves, other than whole tensors of the model, and which they are.
    """
    told: dict[str, list[Any]] = {}
    for one in trained:
        mine: list[Any] = [one.name, one.form, tuple(one.master.shape), one.still]
        if values and one.form != "whole":
            mine += [_sum_of(part) for part in (one.index, one.master) if part is not None and not is_sharded(part)]
        told.setdefault(one.slot, []).append(mine)
    return {slot: hashlib.sha256(repr(mine).encode()).hexdigest() for slot, mine in told.items()}


def _sum_of(values: Tensor) -> tuple[float, ...]:
    """Two numbers that other values of a tensor would hardly have."""
    return machine.total(values), machine.norm(values)
