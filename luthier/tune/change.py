"""What trains may change in mid-run: techniques observe dense gradients, then numbers come and go, and their moments move along."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Additive, Now, Place, Refresh, Resize, Select, Selective, Services, State, Tensors
from luthier.models.sharding import put, whole
from luthier.tune.attach import put_tap
from luthier.tune.sites import Addition
from luthier.tune.trained import Trained, check_select, read, write

if TYPE_CHECKING:
    from luthier.tune.tune import Tune


def _techniques(tune: Tune) -> list[tuple[str, Selective | Additive, State]]:
    return [*tune.selectives, *tune.additives]


def _places(tune: Tune, slot: str) -> list[Place]:
    return list(dict.fromkeys(one.place for one in tune.trained.values() if one.slot == slot and one.place is not None))


def start_observing(tune: Tune, now: Now) -> None:
    """Decide which places are observed in this step; others form no dense gradient."""
    tune.dense.clear()
    tune.observing = frozenset(
        (slot, place)
        for slot, value, _ in _techniques(tune)
        if value.observe is not None and (value.observing is None or value.observing(now))
        for place in _places(tune, slot)
    )


def observe(tune: Tune, total: Callable[[Tensor], Tensor]) -> None:
    """Hand each observer the dense gradient of the whole step, once a place.

    Raises:
        LuthierError: a place saw no gradient, so that what was observed would be silently wrong.
    """
    for slot, value, state in _techniques(tune):
        if value.observe is None:
            continue
        for place in _places(tune, slot):
            if (slot, place) in tune.observing:
                value.observe(state, place, _dense(tune, slot, place, total))
    tune.dense.clear()
    tune.observing = frozenset()


def observe_nothing(tune: Tune) -> None:
    """Stand in with zeros where this process had no rows: the others wait for it to take part in the sums."""
    for slot, place in tune.observing:
        values = tune.region(place)
        tune.dense[slot, place] = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))


def _dense(tune: Tune, slot: str, place: Place, total: Callable[[Tensor], Tensor]) -> Tensor:
    trained = tune.trained.get(f"{slot}/{place}")
    if trained is not None and trained.form == "whole" and trained.gradient is not None:
        # What trains was summed over the processes already.
        gradient = whole(trained.gradient)
        return gradient.t() if place.module in tune.parts.transposed and gradient.ndim == 2 else gradient
    if (slot, place) not in tune.dense:
        raise LuthierError(
            f"`{slot}` observes a place that no gradient reached", where=str(place), mend="leave this role out of it"
        )
    return total(tune.dense[slot, place])


def refresh(tune: Tune, services_of: Callable[[str], Services]) -> list[str]:
    """Let techniques change their numbers, and say what changed."""
    said: list[str] = []
    for slot, value, state in tune.selectives:
        if value.refresh is not None:
            for place, new in (value.refresh(state, services_of(slot)) or {}).items():
                said.append(_reselect(tune, slot, value, place, new))
    for slot, additive, state in tune.additives:
        if additive.refresh is not None:
            for place, size in (additive.refresh(state, services_of(slot)) or {}).items():
                said.append(_resize(tune, slot, place, size))
    return said


def _reselect(tune: Tune, slot: str, value: Selective, place: Place, new: Refresh) -> str:
    old = tune.trained[f"{slot}/{place}"]
    values = tune.region(place)
    if old.form == "whole" or old.index is None or old.start is None:
        raise LuthierError(f"`{slot}` changes a selection of whole tensors", where=str(place), mend="select rows or entries")
    check_select(place, Select(old.form, new.index), values)  # type: ignore[arg-type]
    axis, stays = old.axis, new.take >= 0
    old_size = old.master.shape[axis]
    if value.leave == "revert":
        write(values, old.form, old.index, old.start)
    start = read(values, old.form, new.index).clone()
    master = start.to(old.master.dtype)
    if new.seed is not None:
        master = master + new.seed.to(master.dtype)
    shape = [1] * master.ndim
    shape[axis] = -1
    kept = stays.reshape(shape)
    took = new.take.clamp(min=0)
    master = torch.where(kept, old.master.detach().index_select(axis, took), master)
    old.start = torch.where(kept, old.start.index_select(axis, took), start)
    old.index = new.index
    _replace(tune, old, master, new.take, old_size)
    put_tap(tune, old)
    tune.push(old)
    return f"{slot}: {int(stays.sum())} of {len(stays)} stay at {place}"


def _resize(tune: Tune, slot: str, place: Place, size: Resize) -> str:
    additions = [a for a in tune.site(place.module).additions if a.slot == slot and a.place == place]
    addition: Addition = additions[0]
    for name, values in size.tensors.items():
        trained = addition.trained[name]
        old_size = trained.master.shape[trained.axis]
        _replace(tune, trained, values.detach().to(trained.master.dtype), size.take[name], old_size)
    shapes = ", ".join(f"{name} {tuple(one.master.shape)}" for name, one in addition.trained.items())
    return f"{slot}: {shapes} at {place}"


def _replace(tune: Tune, trained: Trained, master: Tensor, take: Tensor, old_size: int) -> None:
    trained.master = trained.leaf = master.clone(memory_format=torch.contiguous_format).requires_grad_(True)
    trained.gradient = None
    tune.register(trained)
    tune.moved(trained, take, old_size)


def left_behind(tune: Tune) -> list[str]:
    """Parameters in which numbers that no longer train keep what they learnt: they must be saved whole."""
    keeping = {slot for slot, value, _ in tune.selectives if value.refresh is not None and value.leave == "keep"}
    mine = [one.place for one in tune.trained.values() if one.slot in keeping]
    return sorted({place.parameter for place in mine if place is not None})


def capture(tune: Tune) -> Tensors:
    """Copies of all trained numbers, and of which numbers they are where that may change; by path."""
    values: Tensors = {}
    for name, one in tune.trained.items():
        values[f"master|{name}"] = one.master.detach().clone()
        if one.changes and one.index is not None and one.start is not None:
            values[f"index|{name}"], values[f"start|{name}"] = one.index, one.start
    values.update({f"live|{name}": tune.model.get_parameter(name).data.clone() for name in left_behind(tune)})
    return values


def put_back(tune: Tune, values: Tensors) -> None:
    """Bring everything that trains, and the live weights with it, to what `capture` gave.

    Raises:
        KeyError: the values lack a tensor that trains here.
    """
    for one in tune.trained.values():
        if one.changes and one.index is not None and one.start is not None and one.place is not None:
            write(tune.region(one.place), one.form, one.index, one.start)
    for name in left_behind(tune):
        put(tune.model.get_parameter(name).data, values[f"live|{name}"])
    for name, one in tune.trained.items():
        master = values[f"master|{name}"].to(one.master.device)
        if f"index|{name}" in values:
            one.index, one.start = (values[f"{what}|{name}"].to(master.device) for what in ("index", "start"))
        if master.shape == one.master.shape:
            put(one.master.data, master)
        else:
            one.master = one.leaf = master.clone().requires_grad_(True)
            tune.register(one)
        if one.form not in ("whole", "factor", "free"):
            put_tap(tune, one)
        tune.push(one)
