"""The model at another point in time: the base, or a snapshot. Exchanged and put back, never copied where that can be avoided."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from luthier.errors import LuthierError
from luthier.tune.attached import Attached
from luthier.tune.change import capture, put_back
from luthier.tune.trained import Trained, read, write


def in_place(tune: Attached) -> list[Trained]:
    """Trained tensors that are numbers of the model itself."""
    return [one for one in tune.trained.values() if one.form not in ("factor", "free")]


@contextmanager
def at_base(tune: Attached) -> Iterator[None]:
    """Run the base. Free for what stands beside the weights; numbers trained in place are exchanged with kept ones.

    Raises:
        LuthierError: numbers train in place and the base was not kept, or the model is merged.
    """
    if tune.is_off:
        yield
        return
    if tune.only_shapes:
        with tune.bare():
            yield
        return
    if tune.merged is not None:
        raise LuthierError("the merged model does not hold the base", fix="call unmerge() first")
    if tune.untouched and not any(value.subtract for _, value, _ in tune.weight_deltas):
        tune.is_off = True
        try:
            yield
        finally:
            tune.is_off = False
        return
    if tune.untouched and not tune.altered:
        # What a start took out of the weights still stands beside them: together they are the base, up to rounding.
        yield
        return
    # Parameters kept whole need no second look at the numbers that train in them.
    changed = [one for one in in_place(tune) if _name(one) not in tune.altered]
    subtracts = any(value.subtract for _, value, _ in tune.weight_deltas)
    keeps = {slot for slot, value, _ in tune.selectives if value.refresh is not None and value.leave == "keep"}
    lost = any(one.start is None or one.slot in keeps for one in changed)
    if lost or (subtracts and not tune.altered):
        raise LuthierError(
            "the base's values were not kept",
            fix="let something in the run compare with the base, such as objective: [cross_entropy, {kl: {weight: 0}}]",
        )
    saved: list[tuple[Trained, Tensor]] = []
    # Exchanging storage is free and leaves alone what autograd has saved for backward.
    exchanged = [(tune.model.get_parameter(name), base) for name, base in tune.altered.items()]
    exchanged += [(tune.model.get_parameter(_name(one)), one.start) for one in changed if one.form == "whole"]  # type: ignore[misc]
    before = [(parameter, parameter.data) for parameter, _ in exchanged]
    for parameter, base in exchanged:
        parameter.data = base
    for one in changed:
        if one.form != "whole":
            assert one.place is not None and one.start is not None
            values = tune.region(one.place)
            saved.append((one, read(values, one.form, one.index)))
            write(values, one.form, one.index, one.start)
    tune.is_off = True
    try:
        yield
    finally:
        tune.is_off = False
        for one, now in reversed(saved):
            assert one.place is not None
            write(tune.region(one.place), one.form, one.index, now)
        for parameter, data in reversed(before):
            parameter.data = data


def _name(one: Trained) -> str:
    assert one.place is not None
    return one.place.parameter


@contextmanager
def at_snapshot(tune: Attached, name: str) -> Iterator[None]:
    """Run with the trained numbers of a snapshot."""
    if name not in tune.snapshots:
        known = ", ".join(tune.snapshots) or "none was taken"
        raise LuthierError(f"there is no snapshot `{name}`", fix=f"known: {known}")
    if tune.only_shapes:
        yield
        return
    now, untouched = capture(tune), tune.untouched
    trained = {key: (one, one.master, one.leaf) for key, one in tune.trained.items()}
    owned = [(own, dict(own.trained)) for own in tune.owns]
    listening = tune.moved, tune.renewed, tune.left
    # Moments belong to what trains: nobody hears of tensors that come and go for a while.
    tune.moved, tune.renewed, tune.left = (lambda *told: None,) * 3
    try:
        put_back(tune, tune.snapshots[name])
        yield
    finally:
        for key, one in list(tune.trained.items()):
            if trained.get(key, (None,))[0] is not one:
                tune.forget(one)
        for own, tensors in owned:
            own.trained = tensors
        missing = trained.keys() - tune.trained.keys()
        tune.trained = {key: one for key, (one, _, _) in trained.items()}
        for key, (one, master, leaf) in trained.items():
            if one.leaf is not leaf or key in missing:
                # A graph may wait for backward with these very tensors.
                one.master, one.leaf = master, leaf
                tune.register(one)
        put_back(tune, now)
        tune.moved, tune.renewed, tune.left = listening
        tune.untouched = untouched


@contextmanager
def running(tune: Attached, name: str) -> Iterator[Attached]:
    """Another model of the run, ready to run. One that stands beside the run's own weights needs the base in them for that long."""
    other = tune.others[name]
    if other.beneath is None:
        yield other
        return
    with at_base(tune):
        other.is_off = False
        try:
            yield other
        finally:
            other.is_off = True
