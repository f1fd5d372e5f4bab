"""Deltas and tunes: what a tune kept of its base, what stands beside its weights, and putting a delta back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from luthier.delta.forms import Dense, Form, LowRank
from luthier.delta.sources import live, ties, untie
from luthier.errors import LuthierError
from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.kinds.parts import Parts
from luthier.models.fingerprint import fingerprint
from luthier.models.quantized import refuse_change, shape_of
from luthier.tune.each import of_expert

if TYPE_CHECKING:
    from luthier.tune import Tune
    from luthier.tune.sites import Addition


class Kept(NamedTuple):
    """What a tune can tell of its base."""

    base: dict[str, Tensor]
    """The base's numbers of parameters in which numbers train or a start changed them."""
    tuned: dict[str, Tensor]
    """What these parameters hold now."""
    fingerprint: str
    """Of the base."""


def kept_base(tune: Tune, identity: str | None) -> Kept:
    """The base as the tune kept it, for the parameters that may differ from it.

    Args:
        tune: not merged.
        identity: the base's fingerprint; None: computed.

    Raises:
        LuthierError: numbers changed in place, and the base was not kept.
    """
    inside = [one.place for one in tune.trained.values() if one.place is not None and one.form not in ("factor", "free")]
    names = dict.fromkeys([*(place.parameter for place in inside), *changed_by_starts(tune)])
    now = live(tune.model)
    with tune.at("base"):
        was = live(tune.model)
        # What exchanges its storage can be kept by reference; numbers written into the live weight cannot.
        base = {name: was[name].clone() if was[name].data_ptr() == now[name].data_ptr() else was[name] for name in names}
        identity = fingerprint(tune.model) if identity is None else identity
    return Kept(base, {name: now[name] for name in names}, identity)


def changed_by_starts(tune: Tune) -> list[str]:
    """Parameters of the base that a technique changed when it was attached.

    Raises:
        LuthierError: the tune did not keep what they were.
    """
    names = [one.place.parameter for one in tune.additions if one.value.subtract and one.place is not None]
    lost = next((name for name in names if name not in tune.altered), None)
    if lost is not None:
        raise LuthierError(
            "a start changed the base, and what it was is not kept",
            where=lost,
            fix="make the tune with keep_base=True",
        )
    return names


def forms_beside(tune: Tune) -> dict[str, tuple[Form, ...]]:
    """The deltas that stand beside the weights, by parameter: low-rank where the technique is, else dense."""
    forms: dict[str, tuple[Form, ...]] = {}
    for one in tune.additions:
        assert one.place is not None
        forms[one.place.parameter] = (*forms.get(one.place.parameter, ()), _form(tune, one))
    return forms


def first_name(tune: Tune, name: str) -> str:
    """The name under which a tied parameter is changed in place; the name itself for all others."""
    module, _, tensor = name.rpartition(".")
    return f"{tune.parts.ties[module]}.{tensor}" if module in tune.parts.ties else name


def _form(tune: Tune, one: Addition) -> Form:
    assert one.place is not None
    place, tensors = one.place, one.masters()
    shape = shape_of(tune.model, place.parameter)
    transposed = place.module in tune.parts.transposed
    if one.value.pair is not None:
        down, up = (tensors[key].cpu().clone() for key in one.value.pair)
        return LowRank(up, down, one.value.scale, shape, place.start, place.stop, transposed)
    if one.value.factors is not None:
        down, up = (values.cpu().clone() for values in one.value.factors(tensors))
        return LowRank(up, down, 1.0, shape, place.start, place.stop, transposed)
    delta_OI = one.delta(tensors).cpu()
    spread = delta_OI.new_zeros(shape)
    tune.parts.outputs(place, spread).copy_(delta_OI)
    return Dense(spread)


def standing(changes: Mapping[str, Sequence[Form]], parts: Parts) -> WeightDelta:
    """Changes of matrices, as wholes, as a technique that stands beside weights that cannot take them."""

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        change = torch.zeros_like(weight_OI)
        for form in changes.get(place.parameter, ()):
            spread = form.spread().to(change.device)
            change += of_expert(parts.outputs(place, spread), services)
        return {"change": change}

    return WeightDelta(
        start=start,
        apply=lambda tensors, x: functional.linear(x, tensors["change"]),
        delta=lambda tensors: tensors["change"],
        target_modules=tuple(dict.fromkeys(place.role for place in parts.places if place.parameter in changes)),
    )


def restore(tune: Tune, changes: Mapping[str, Sequence[Form]]) -> None:
    """Put a delta into a tune: what was beside the weights stands there again, the rest goes into the weights.

    Raises:
        LuthierError: no attached technique takes a low-rank change, one cannot be told apart from changes in place, or
            numbers train in place.
    """
    inside = next((one for one in tune.trained.values() if one.form not in ("factor", "free")), None)
    if inside is not None:
        raise LuthierError(
            f"`{inside.slot}` trains in place, and would not notice",
            where=inside.name,
            fix="attach it after restoring",
        )
    written = [name for name, forms in changes.items() if not all(isinstance(form, LowRank) for form in forms)]
    refuse_change(tune.model, written, "the delta changes single numbers of a weight", "apply it to the base without quantization")
    free = tune.additions
    taken: list[tuple[Addition, LowRank]] = []
    for name, forms in changes.items():
        for form in forms:
            if isinstance(form, LowRank):
                one = next((one for one in free if _takes(one, name, form)), None)
                if one is None:
                    raise LuthierError(
                        "no technique that is attached takes this low-rank change",
                        where=name,
                        fix="attach what the run was made with, or put the delta into the weights with apply()",
                    )
                free.remove(one)
                taken.append((one, form))
    for one in free:
        if bool(one.delta(one.masters()).any()):
            raise LuthierError(
                f"`{one.slot}` has a delta already, and its factors cannot be had from this one",
                where=str(one.place),
                fix="put the delta into the weights of the base with apply()",
            )
    _put_in_place(tune, changes)
    for one, form in taken:
        _put_beside(tune, one, form)


def _takes(one: Addition, name: str, form: LowRank) -> bool:
    place = one.place
    fits = place is not None and (place.parameter, place.start, place.stop) == (name, form.start, form.stop)
    return fits and one.value.pair is not None


def _put_in_place(tune: Tune, changes: Mapping[str, Sequence[Form]]) -> None:
    inside = {name: [form for form in forms if not isinstance(form, LowRank)] for name, forms in changes.items()}
    for name in ties(tune.model):
        if inside.get(name):
            untie(tune.model, name)
    weights = live(tune.model)
    for name in changed_by_starts(tune):
        # The delta says what became of these.
        weights[name].copy_(tune.altered[name])
    for name, forms in inside.items():
        if forms:
            # Nothing that trains here tells what these were.
            tune.altered.setdefault(name, weights[name].clone())
        for form in forms:
            form.add_to(weights[name], 1)


def _put_beside(tune: Tune, one: Addition, form: LowRank) -> None:
    assert one.value.pair is not None
    down, up = one.value.pair
    up_OR = form.up_OR if form.scale == one.value.scale else form.up_OR * (form.scale / one.value.scale)
    for key, values in ((down, form.down_RI), (up, up_OR)):
        trained = one.trained[key]
        if trained.master.shape != values.shape:
            trained.master = trained.leaf = torch.empty_like(values, device=trained.master.device).requires_grad_(True)
            tune.register(trained)
        tune.set({trained.name: values})
