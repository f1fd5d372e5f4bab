"""What trains may change in mid-run: techniques observe dense gradients, then numbers come and go, and their moments move along."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import (
    Form,
    Freezing,
    Now,
    Place,
    Refresh,
    RepresentationEdit,
    Resize,
    Select,
    Selective,
    Services,
    State,
    Tensors,
    WeightDelta,
)
from luthier.kinds.parts import outputs_first
from luthier.models.sharding import put, whole
from luthier.tune.attach import master_type, own, put_tap, whole_master
from luthier.tune.attached import Attached
from luthier.tune.sites import Addition, Edit, Own
from luthier.tune.trained import Trained, check_select, read, write


def _techniques(tune: Attached) -> list[tuple[str, Selective | WeightDelta, State]]:
    return [*tune.selectives, *tune.weight_deltas]


def _places(tune: Attached, slot: str) -> list[Place]:
    return list(dict.fromkeys(one.place for one in tune.trained.values() if one.slot == slot and one.place is not None))


def freeze(tune: Attached, now: Now) -> None:
    """Let stand still what techniques want still in this step, and wake the rest."""
    for one in tune.trained.values():
        asking, still = _held(tune, one, now)
        if still != one.still:
            one.still = still
            if one.still and any(value.forget for value in asking):
                _forget(tune, one)
            elif one.forgotten:
                _remember(tune, one)
        one.leaf.requires_grad_(not one.still)


def _held(tune: Attached, one: Trained, now: Now) -> tuple[list[Freezing], bool]:
    """What wants a tensor to stand still in this step, and whether it does."""
    mine = [
        (slot, value, state)
        for slot, value, state in tune.freezings
        if slot == one.slot or (value.everywhere and tune.turns.moves(slot, now))
    ]
    asking = [value for slot, value, state in mine if value.frozen(one, state, tune.turns.own(slot, now))]
    return asking, bool(asking) or tune.turns.alone(now) not in (None, one.slot)


def moves_at(tune: Attached, now: Now) -> bool:
    """Whether anything trains in a step, as far as it can be known beforehand."""
    return any(not _held(tune, one, now)[1] for one in tune.trained.values())


def hold_still(tune: Attached, name: str, *, forget: bool) -> None:
    """Bring a tensor into the state of one that stands still, as it was when a checkpoint was written."""
    one = tune.trained[name]
    one.still = True
    one.leaf.requires_grad_(False)
    if forget:
        _forget(tune, one)


def _forget(tune: Attached, one: Trained) -> None:
    tune.left(one)
    one.forgotten = True
    if one.form == "whole":
        # While it stands still, what the model holds is master enough.
        one.master = one.leaf.data


def _remember(tune: Attached, one: Trained) -> None:
    if one.form == "whole":
        one.master = whole_master(tune, one.leaf)
    one.forgotten = False
    tune.renewed(one)


def start_observing(tune: Attached, now: Now) -> None:
    """Decide which places are observed in this step; others form no dense gradient."""
    tune.dense.clear()
    tune.observing = frozenset(
        (slot, place)
        for slot, value, _ in _techniques(tune)
        if value.observe is not None
        and tune.turns.moves(slot, now)
        and (value.observing is None or value.observing(tune.turns.own(slot, now)))
        for place in _places(tune, slot)
    )


def observed(tune: Attached) -> list[str]:
    """Names of what trains at the places that are observed in this step."""
    return [one.name for one in tune.trained.values() if (one.slot, one.place) in tune.observing]


def observe(
    tune: Attached,
    total: Callable[[Tensor], Tensor],
    received: Mapping[str, Tensor],
    factor: Callable[[Collection[str]], float],
) -> None:
    """Hand each observer the dense gradient of the whole step, once a place, as optimizers received it.

    Args:
        tune: what is attached.
        total: sums over the processes.
        received: what the optimizers received of whole tensors that train, by name.
        factor: by how much the gradients of some tensors were scaled on their way to the optimizers. Of numbers that do not train there
            is nothing that was received: they count as those that do at the same place.

    Raises:
        LuthierError: a place saw no gradient, so that what was observed would be silently wrong.
    """
    for slot, value, state in _techniques(tune):
        if value.observe is None:
            continue
        for place in _places(tune, slot):
            if (slot, place) in tune.observing:
                value.observe(state, place, _dense(tune, slot, place, total, received, factor))
    tune.dense.clear()
    tune.observing = frozenset()


def observe_nothing(tune: Attached) -> None:
    """Stand in with zeros where this process had no rows: the others wait for it to take part in the sums."""
    for slot, place in tune.observing:
        values = tune.region(place)
        tune.dense[slot, place] = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))


def _dense(
    tune: Attached,
    slot: str,
    place: Place,
    total: Callable[[Tensor], Tensor],
    received: Mapping[str, Tensor],
    factor: Callable[[Collection[str]], float],
) -> Tensor:
    trained = tune.trained.get(f"{slot}/{place}")
    if trained is not None and trained.form == "whole" and trained.name in received:
        # What trains was summed over the processes already.
        return outputs_first(whole(received[trained.name]), place, tune.parts.transposed)
    if (slot, place) not in tune.dense:
        raise LuthierError(f"`{slot}` observes a place that no gradient reached", where=str(place), fix="leave this role out of it")
    here = [one.name for one in tune.trained.values() if one.slot == slot and one.place == place]
    return total(tune.dense[slot, place]) * factor(here)


def refresh(tune: Attached, services_of: Callable[[str], Services], now: Now) -> list[str]:
    """Let techniques whose step this was change their numbers, and say what changed."""
    said: list[str] = []
    for slot, value, state in tune.selectives:
        if value.refresh is not None and tune.turns.moves(slot, now):
            for place, new in (value.refresh(state, services_of(slot)) or {}).items():
                said.append(_reselect(tune, slot, value, place, new))
    grows: list[tuple[str, WeightDelta | RepresentationEdit, State]] = [*tune.weight_deltas, *tune.edits]
    for slot, beside, state in grows:
        if beside.refresh is not None and tune.turns.moves(slot, now):
            for place, size in (beside.refresh(state, services_of(slot)) or {}).items():
                said.append(_resize(tune, slot, place, size))
    return said


def _reselect(tune: Attached, slot: str, value: Selective, place: Place, new: Refresh) -> str:
    old = tune.trained[f"{slot}/{place}"]
    values = tune.region(place)
    form = new.form or old.form
    if form == "whole" or old.start is None:
        raise LuthierError(f"`{slot}` changes a selection of whole tensors", where=str(place), fix="select rows or entries")
    if form != old.form and bool((new.take >= 0).any()):
        raise LuthierError(f"`{slot}` continues entries in another form", where=str(place), fix="let all of them be new")
    check_select(place, Select(form, new.index), values)  # type: ignore[arg-type]
    if value.leave == "revert":
        _revert(tune, old)
    if form != old.form:
        return _reform(tune, slot, old, form, new)
    axis, stays = old.axis, new.take >= 0
    old_size = old.master.shape[axis]
    start = read(values, form, new.index).clone()
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
    if new.seen is not None:
        tune.seeded(old, ~kept.expand_as(master), new.seen)
    put_tap(tune, old)
    tune.push(old)
    return f"{slot}: {int(stays.sum())} of {len(stays)} stay at {place}"


def _revert(tune: Attached, one: Trained) -> None:
    assert one.place is not None and one.start is not None
    if one.form == "whole":
        tune.model.get_parameter(one.place.parameter).data.copy_(one.start)
    else:
        write(tune.region(one.place), one.form, one.index, one.start)


def _reform(tune: Attached, slot: str, old: Trained, form: Form, new: Refresh) -> str:
    """Train another form of a tensor from here on: everything about it is new."""
    assert old.place is not None
    values = tune.region(old.place)
    _set_form(old, form, new.index, read(values, form, new.index).clone())
    assert old.start is not None
    master = old.start.to(master_type(tune, values), copy=True, memory_format=torch.contiguous_format)
    if new.seed is not None:
        master = master + new.seed.to(master.dtype)
    old.master = old.leaf = master.requires_grad_(True)
    old.gradient = None
    tune.register(old)
    tune.renewed(old)
    put_tap(tune, old)
    tune.push(old)
    return f"{slot}: {len(new.index)} {form} of {old.place} from here on"


def _set_form(one: Trained, form: Form, index: Tensor, start: Tensor) -> None:
    if one.form == "whole":
        one.leaf.requires_grad_(False)
    one.form, one.index, one.start, one.axis = form, index, start, int(form == "cols")


def _select_again(tune: Attached, one: Trained, index: Tensor) -> None:
    """Train the entries of a snapshot: a selection that was computed anew on another machine may have come out otherwise."""
    assert one.place is not None
    if one.index is None or torch.equal(index, one.index):
        return
    one.index = index
    if one.start is not None:
        one.start = read(tune.region(one.place), one.form, index).clone()


def _make_whole(tune: Attached, one: Trained) -> None:
    """Train the whole of a tensor again, of which a part trains now; the part is back at its start already."""
    assert one.place is not None
    tune.site(one.place.module).taps.pop(one.name, None)
    live = tune.model.get_parameter(one.place.parameter).requires_grad_(True)
    one.form, one.index, one.start, one.axis, one.leaf = "whole", None, live.data.clone(), 0, live
    one.master = whole_master(tune, live)
    tune.register(one)


def _resize(tune: Attached, slot: str, place: Place, size: Resize) -> str:
    owner = next(one for one in tune.owns if one.slot == slot and one.place == place)
    assert isinstance(owner, Addition | Edit)
    for name in [name for name in owner.trained if name not in size.tensors]:
        tune.forget(owner.trained.pop(name))
    owner.frozen = {name: values for name, values in owner.frozen.items() if name in size.tensors}
    joining: Tensors = {}
    for name, values in size.tensors.items():
        trained = owner.trained.get(name)
        if trained is None:
            joining[name] = values
        elif name in size.take:
            old_size = trained.master.shape[trained.axis]
            _replace(tune, trained, values.detach().to(trained.master.dtype), size.take[name], old_size)
        else:
            trained.master = trained.leaf = values.detach().to(trained.master.dtype, copy=True).requires_grad_(True)
            tune.register(trained)
            tune.renewed(trained)
    join(tune, owner, joining)
    shapes = ", ".join(f"{name} {tuple(one.master.shape)}" for name, one in owner.trained.items())
    return f"{slot}: {shapes or 'nothing'} at {place}"


def join(tune: Attached, owner: Addition | Edit, tensors: Tensors) -> None:
    """Let more tensors of a technique stand at a place."""
    value = owner.value
    axes = value.axes if isinstance(value, WeightDelta) else {}
    undecayed = value.undecayed if isinstance(value, RepresentationEdit) else frozenset()
    own(tune, owner, tensors, changes=True, rates=value.rates, axes=axes, frozen=value.frozen, undecayed=undecayed, wide=value.wide)
    for name in tensors:
        if name in owner.trained:
            tune.renewed(owner.trained[name])


def _replace(tune: Attached, trained: Trained, master: Tensor, take: Tensor, old_size: int) -> None:
    trained.master = trained.leaf = master.clone(memory_format=torch.contiguous_format).requires_grad_(True)
    trained.gradient = None
    tune.register(trained)
    tune.moved(trained, take, old_size)


def left_behind(tune: Attached) -> list[str]:
    """Parameters in which numbers that no longer train keep what they learned: they must be saved whole."""
    keeping = {slot for slot, value, _ in tune.selectives if value.refresh is not None and value.leave == "keep"}
    mine = [one.place for one in tune.trained.values() if one.slot in keeping]
    return sorted({place.parameter for place in mine if place is not None})


def capture(tune: Attached) -> Tensors:
    """Copies of all trained numbers, and of which numbers they are where that may change; by path."""
    values: Tensors = {}
    for name, one in tune.trained.items():
        values[f"master|{name}"] = one.master.detach().clone()
        if one.index is not None:
            values[f"index|{name}"] = one.index
        if one.changes and one.start is not None:
            values[f"form|{name}"] = torch.tensor(FORMS.index(one.form))
            if one.index is not None:
                values[f"start|{name}"] = one.start
    for owner in tune.owns:
        values.update({f"frozen|{owner.name}.{name}": tensor for name, tensor in owner.frozen.items()})
    values.update({f"live|{name}": tune.model.get_parameter(name).data.clone() for name in left_behind(tune)})
    return values


def average(tune: Attached, before: Tensors, now: Tensors, share: float) -> Tensors:
    """What `capture` gave before, moved a share of the way to what it gives now.

    Raises:
        LuthierError: the entries of a trained tensor may change, so that they are not the same in both.
    """
    changing = [one for one in tune.trained.values() if one.changes]
    if changing:
        raise LuthierError(
            f"an average over time needs the same numbers throughout, and those of `{changing[0].slot}` come and go",
            where=changing[0].name,
            fix="remember them as they are instead (a share of 1, `average: 0`), or train fixed numbers",
        )
    mixed = dict(now)
    for name in tune.trained:
        key = f"master|{name}"
        # A narrow type would lose what a small share adds.
        wide = torch.promote_types(now[key].dtype, torch.float32)
        mixed[key] = torch.lerp(before[key].to(wide), now[key].to(wide), share)
    return mixed


FORMS: tuple[Form, ...] = ("whole", "rows", "cols", "flat", "factor", "free")


def _own_as_in(tune: Attached, owner: Own, values: Tensors) -> None:
    """Let the tensors that stand at a place be those of a snapshot."""

    def names(kind: str) -> dict[str, Tensor]:
        before = f"{kind}|{owner.name}."
        found = {key.removeprefix(before): tensor for key, tensor in values.items() if key.startswith(before)}
        return {name: tensor for name, tensor in found.items() if name.isidentifier()}

    device = next(tune.model.parameters()).device
    owner.frozen = {name: tensor.to(device) for name, tensor in names("frozen").items()}
    if not isinstance(owner, Addition | Edit) or (owner.trained and not any(one.changes for one in owner.trained.values())):
        return
    wanted = names("master")
    for name in [name for name in owner.trained if name not in wanted]:
        tune.forget(owner.trained.pop(name))
    join(tune, owner, {name: tensor for name, tensor in wanted.items() if name not in owner.trained})


def put_back(tune: Attached, values: Tensors) -> None:
    """Bring everything that trains, and the live weights with it, to what `capture` gave.

    Raises:
        KeyError: the values lack a tensor that trains here.
    """
    for owner in tune.owns:
        _own_as_in(tune, owner, values)
    for one in tune.trained.values():
        if one.changes and one.start is not None:
            _revert(tune, one)
    for name in left_behind(tune):
        put(tune.model.get_parameter(name).data, values[f"live|{name}"])
    for name, one in list(tune.trained.items()):
        master = values[f"master|{name}"].to(one.master.device)
        was = one.form
        if f"index|{name}" in values and not one.changes:
            _select_again(tune, one, values[f"index|{name}"].to(master.device))
        elif f"index|{name}" in values:
            index, start = (values[f"{what}|{name}"].to(master.device) for what in ("index", "start"))
            _set_form(one, FORMS[int(values[f"form|{name}"])], index, start)
        elif f"form|{name}" in values and was != "whole":
            _make_whole(tune, one)
        if master.shape == one.master.shape and was == one.form:
            put(one.master.data, master)
        elif one.form == "whole":
            one.master.data.copy_(master)
        else:
            one.master = one.leaf = master.clone().requires_grad_(True)
            tune.register(one)
        if one.form not in ("whole", "factor", "free"):
            put_tap(tune, one)
        tune.push(one)
        # What is made anew here must not move in a step in which it stands still.
        one.leaf.requires_grad_(not one.still)
