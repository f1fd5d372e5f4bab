"""Attaching techniques: from a kind's value to trained tensors and hooks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds import Form, Place, Prefix, Prompt, RepresentationEdit, Select, Selective, Services, State, Tensors, WeightDelta
from luthier.kinds.parts import SUBLAYERS
from luthier.models.attention import use_context
from luthier.models.embedding import scale_of
from luthier.models.experts import is_linear
from luthier.models.quantized import quantized, refuse_change, shape_of
from luthier.models.sharding import whole
from luthier.tune.attached import Attached
from luthier.tune.each import started_each
from luthier.tune.saving import guard
from luthier.tune.sites import Addition, Edit, Own
from luthier.tune.taps import TapSpec
from luthier.tune.trained import Trained, check_select, decays, read, write

NEW_TOKENS = "new_tokens"
"""The slot of the rows of tokens that were added for a run."""
Owned = TypeVar("Owned", bound=Own)


def add_selective(tune: Attached, slot: str, value: Selective, services: Services, state: State) -> None:
    """Free the numbers a selection chooses."""
    # Before anything is chosen: that can take gradients of all weights.
    refuse_change(
        tune.model,
        (f"{name}.weight" for name in quantized(tune.model)),
        f"`{slot}` trains the model's own weights",
        "use lora or another technique that stands beside them, or quantize: none",
    )
    free(tune, slot, value, value.choose(tune.parts, services), state)


def add_new_rows(tune: Attached, state: State) -> None:
    """Free the rows of new tokens, in the embedding and in a head of its own, where nothing trains them yet. They stand in no matrix that
    can be quantized."""
    modules = (tune.parts.embedding, tune.parts.head)
    whole_ = {one.place.parameter for one in tune.trained.values() if one.form == "whole" and one.place is not None}
    rows = Select("rows", torch.tensor(tune.parts.added))
    places = [place for place in tune.parts.places if place.module in modules and place.parameter not in whole_]
    if places:
        free(tune, NEW_TOKENS, Selective(lambda *_: dict.fromkeys(places, rows)), dict.fromkeys(places, rows), state)


def trains_new_rows(tune: Attached) -> bool:
    """Whether rows of new tokens train by themselves."""
    return any(one.slot == NEW_TOKENS for one in tune.trained.values())


def free(tune: Attached, slot: str, value: Selective, chosen: Mapping[Place, Select], state: State) -> None:
    """Free numbers that were chosen."""
    if not chosen:
        has = f"this model has {', '.join(tune.parts.roles())}"
        raise LuthierError(f"`{slot}` selects nothing to train", fix=f"widen its target_modules or its share; {has}")
    changes = value.refresh is not None
    if changes and value.leave == "keep" and tune.keep_base:
        # Numbers that leave keep what they learned, so their own base values would be lost.
        remember(tune, {place.parameter for place in chosen})
    for place, select in chosen.items():
        check_select(place, select, tune.region(place))
        if changes or not (select.form == "whole" or (select.form == "rows" and is_stack(tune, place))):
            # Refused now rather than in mid-run, when single entries come to train.
            _taps(tune, slot, place, "flat", None)
        refuse_overlap(tune, slot, place, select)
        tune.register(_selected(tune, slot, place, select, changes))
        trained = tune.trained[f"{slot}/{place}"]
        if trained.form != "whole":
            put_tap(tune, trained)
            if value.observe is not None:
                observe_at(tune, slot, place)
    tune.selectives.append((slot, value, state))


def _selected(tune: Attached, slot: str, place: Place, select: Select, changes: bool) -> Trained:
    live = tune.model.get_parameter(place.parameter)
    values = tune.region(place)
    form, index = select.form, None if select.index is None else select.index.to(values.device)
    if form == "whole" and place.start is not None:
        # A whole part of a fused projection is some rows of its tensor.
        form, index = "rows", torch.arange(values.shape[0], device=values.device)
    pulled = select.decay == "start"
    keep = tune.keep_base or changes or pulled
    name = f"{slot}/{place}"
    if form != "whole" or keep or select.start is not None:
        _refuse_sharded(tune, slot, place, "trains a part of a tensor" if form != "whole" else "needs the base's values")
    before = None if not keep else live.data.clone() if form == "whole" else read(values, form, index)
    if select.start is not None:
        tune.untouched = False
        write(values, form, index, select.start)
    if form == "whole":
        live.requires_grad_(True)
        trained = Trained(name, slot, place, form, None, whole_master(tune, live), live, start=before)
    else:
        kind = master_type(tune, live)
        # Fused optimizers walk memory: a slice of a transposed weight must not keep its strides.
        master = read(values, form, index).to(kind, copy=True, memory_format=torch.contiguous_format).requires_grad_(True)
        trained = Trained(name, slot, place, form, index, master, master, start=before)
    trained.rate, trained.changes, trained.decays_to_start = select.rate, changes, pulled
    trained.axis = 1 if form == "cols" else 0
    trained.decay = decays(place, values)
    return trained


def master_type(tune: Attached, values: Tensor) -> torch.dtype:
    """The type of what optimizers see of some of the model's numbers."""
    return torch.promote_types(values.dtype, torch.float32) if tune.masters == "fp32" else values.dtype


def whole_master(tune: Attached, live: Tensor) -> Tensor:
    """What optimizers see of a whole tensor: the live numbers themselves, or a copy in a wider type."""
    return live.data.to(master_type(tune, live))


def _refuse_sharded(tune: Attached, slot: str, place: Place, does: str) -> None:
    if tune.root is not None:
        raise LuthierError(
            f"`{slot}` {does}, which a model spread over processes cannot do yet",
            where=str(place),
            fix="use train.sharding: none, or tune: full or lora",
        )


def put_tap(tune: Attached, trained: Trained) -> None:
    """Put the tap that forms a slice's gradient behind every module that uses its tensor; what trains of a stack of experts stands in for
    it."""
    place = trained.place
    assert place is not None
    if is_stack(tune, place):
        site = tune.site(place.module)
        site.slices[trained.name] = trained
        site.stand_in(tune.parts.transposed)
        return
    for module, spec in _taps(tune, trained.slot, place, trained.form, trained.index):
        tune.site(module).taps[trained.name] = (trained.leaf, spec)


def is_stack(tune: Attached, place: Place) -> bool:
    """Whether a place holds what each of several experts has, matrices or biases, one behind the other."""
    if place.role != "expert" or is_linear(tune.model.get_submodule(place.module)):
        return False
    return len(shape_of(tune.model, place.parameter)) == (2 if place.tensor.endswith("bias") else 3)


def observe_at(tune: Attached, slot: str, place: Place) -> None:
    """Collect the dense gradient at a place in the steps in which its technique observes."""
    # A leaf of its own makes the tap fire even where weight and input are frozen.
    leaf = torch.zeros(0, device=tune.region(place).device, requires_grad=True)
    key = (slot, place)

    def collect(gradient_OI: Tensor) -> None:
        wide = gradient_OI.to(torch.promote_types(gradient_OI.dtype, torch.float32))
        tune.dense[key] = tune.dense[key] + wide if key in tune.dense else wide

    for module, spec in _taps(tune, slot, place, "whole", None):
        observing = spec._replace(collect=collect, wanted=lambda: key in tune.observing)
        tune.site(module).taps[f"{slot}/{place} observed"] = (leaf, observing)


def _taps(tune: Attached, slot: str, place: Place, form: Form, index: Tensor | None) -> list[tuple[str, TapSpec]]:
    """The modules that use a tensor, and how: a tied embedding is also the head's weight."""
    part = None if place.start is None else slice(place.start, place.stop)
    spec = TapSpec(form, index, part, rows=tune.region(place).shape[0])
    module = tune.model.get_submodule(place.module)
    if place.tensor == "bias" and (is_linear(module) or place.role != "router"):
        return [(place.module, spec._replace(of="bias"))]
    if isinstance(module, nn.Embedding):
        tied = [(name, spec) for name, source in tune.parts.ties.items() if source == place.module]
        return [(place.module, _embedding_spec(slot, module, spec, place)), *tied]
    if len(shape_of(tune.model, place.parameter)) != 2 or not is_linear(module):
        raise LuthierError(
            f"`{slot}` trains parts of a tensor of which only the whole can train",
            where=str(place),
            fix=f"leave the role {place.role} out of it, or select it `whole`",
        )
    return [(place.module, spec)]


def _embedding_spec(slot: str, module: nn.Embedding, spec: TapSpec, place: Place) -> TapSpec:
    scale = scale_of(module)
    if scale is None and type(module).forward is not nn.Embedding.forward:
        raise LuthierError(
            f"`{slot}` trains parts of an embedding that is computed in a way of its own, so only the whole of it can train",
            where=str(place),
            fix=f"leave the role {place.role} out of it, or select it `whole`",
        )
    return spec._replace(of="embedding", scale=1.0 if scale is None else scale, padding=module.padding_idx)


def refuse_overlap(tune: Attached, slot: str, place: Place, select: Select) -> None:
    """Refuse to train a number twice."""
    others = [
        one
        for one in tune.trained.values()
        if one.place is not None and one.place.parameter == place.parameter and one.form not in ("factor", "free")
    ]
    for other in others:
        assert other.place is not None
        mine = _claim(tune, place, select.form, select.index)
        if bool((mine & _claim(tune, other.place, other.form, other.index)).any()):
            raise LuthierError(
                f"`{slot}` and `{other.slot}` both train the same numbers",
                where=str(place),
                fix="give them different target_modules or blocks, or leave this tensor to one of them",
            )


def _claim(tune: Attached, place: Place, form: Form, index: Tensor | None) -> Tensor:
    claim = torch.zeros(tune.model.get_parameter(place.parameter).shape, dtype=torch.bool)
    write(tune.parts.outputs(place, claim), form, None if index is None else index.cpu(), torch.ones((), dtype=torch.bool))
    return claim


def add_weight_delta(tune: Attached, slot: str, value: WeightDelta, services: Services, state: State) -> None:
    """Add deltas on linear maps."""
    places = _places(tune, value.target_modules, slot)
    if value.subtract:
        refuse_change(
            tune.model,
            (place.parameter for place in places),
            f"`{slot}` takes its start out of the weights",
            "use lora or another delta that starts at zero, or quantize: none",
        )
    for place in places:
        _check_added(tune, slot, place, value)
    shared = _shared(tune, slot, value, places, services)
    for place in places:
        values = tune.region(place)
        addition = Addition(slot, place, value=value, shared=shared, stacked=values.ndim == 3)
        start = partial(started_each, value) if addition.stacked else value.start
        tensors = start(place, whole(values), services)
        changes = value.refresh is not None
        own(tune, addition, tensors, changes=changes, rates=value.rates, axes=value.axes, frozen=value.frozen, wide=value.wide)
        if value.subtract:
            _refuse_sharded(tune, slot, place, "takes its start out of the weight")
            _take_out(tune, place, addition.delta(addition.masters()))
        site = tune.site(place.module)
        site.additions.append(addition)
        if not is_linear(site.module):
            site.stand_in(tune.parts.transposed)
        if value.observe is not None:
            observe_at(tune, slot, place)
    tune.weight_deltas.append((slot, value, state))


def _check_added(tune: Attached, slot: str, place: Place, value: WeightDelta) -> None:
    """Refuse a place that takes no delta, or none of this kind."""
    module, values = tune.model.get_submodule(place.module), tune.region(place)
    if values.ndim not in (2, 3) or isinstance(module, nn.Embedding):
        raise LuthierError(
            f"`{slot}` adds to linear maps, and this is none", where=str(place), fix="name module types of linear maps"
        )
    if is_linear(module):
        return
    if tune.root is not None:
        _refuse_sharded(tune, slot, place, "adds to what a router or experts compute with")
    for does, asks in (
        ("drops entries of what enters its delta", value.draws),
        ("changes its factors in mid-run", value.refresh is not None),
        ("observes dense gradients", value.observe is not None),
        ("looks at its own tensors as those of one matrix", values.ndim == 3 and not value.stacks),
    ):
        if asks:
            raise LuthierError(
                f"`{slot}` {does}, which it cannot do at the module type {place.role}",
                where=str(place),
                fix="use lora without dropout there, or leave this module type out of target_modules",
            )


def _shared(
    tune: Attached, slot: str, value: WeightDelta | RepresentationEdit, places: Sequence[Place], services: Services
) -> Own | None:
    """What all places of a technique have in common."""
    if value.shared is None:
        return None
    return own(tune, Own(slot, None), value.shared(places, services), rates=value.rates, wide=value.wide)


def remember(tune: Attached, parameters: Iterable[str]) -> None:
    """Keep whole parameters as the base has them: its values cannot be had from the numbers that train."""
    for name in parameters:
        if name not in tune.altered:
            tune.altered[name] = tune.model.get_parameter(name).data.clone()
            for one in tune.trained.values():
                if one.place is not None and one.place.parameter == name and one.start is not None:
                    # A selection that stands here already may have begun with other values.
                    _begin_again(tune, one, one.place, tune.altered[name])


def _begin_again(tune: Attached, one: Trained, place: Place, values: Tensor) -> None:
    """Write what a trained tensor held before its start into a copy of its parameter."""
    assert one.start is not None
    if one.form == "whole":
        values.copy_(one.start)
        return
    write(tune.parts.outputs(place, values), one.form, one.index, one.start)


def _take_out(tune: Attached, place: Place, delta_OI: Tensor) -> None:
    if tune.keep_base:
        remember(tune, [place.parameter])
    values = tune.region(place)
    values.copy_(values.to(torch.promote_types(values.dtype, delta_OI.dtype)) - delta_OI)
    for one in tune.trained.values():
        # What trains in the same weight already would write back what was taken out with its first step.
        if one.place is not None and one.place.parameter == place.parameter and one.form not in ("factor", "free"):
            if one.form != "whole":
                one.master.data.copy_(read(tune.region(one.place), one.form, one.index))
            elif one.master is not one.leaf:
                one.master.data.copy_(tune.model.get_parameter(place.parameter).data)


def add_edit(tune: Attached, slot: str, value: RepresentationEdit, services: Services, state: State) -> None:
    """Edit what modules return or read: those with the named roles, and whole blocks and sub-layers for the roles of these."""
    places = _edited(tune, slot, value)
    shared = _shared(tune, slot, value, places, services)
    for place in places:
        width_out = width_in = tune.parts.width
        if place.role in ("expert", "router") and not is_linear(tune.model.get_submodule(place.module)):
            raise LuthierError(
                f"`{slot}` edits what a matrix gives or reads, and that is out of reach inside {place.module.rpartition('.')[2]}",
                where=str(place),
                fix=f"leave the role {place.role} out of its target_modules",
            )
        if place.tensor and tune.region(place).ndim == 2:
            width_out, width_in = tune.region(place).shape
        if place.start is not None and value.of == "input":
            raise LuthierError(
                f"`{slot}` edits what a part of a fused projection reads, and its parts read the same",
                where=str(place),
                fix="name module types that stand alone in this model",
            )
        edit = Edit(slot, place, value=value, shared=shared)
        tensors = value.start(place, width_in, width_out, services)
        own(
            tune,
            edit,
            tensors,
            changes=value.refresh is not None,
            rates=value.rates,
            frozen=value.frozen,
            undecayed=value.undecayed,
            wide=value.wide,
        )
        tune.site(place.module).edits.append(edit)
    tune.edits.append((slot, value, state))


def _edited(tune: Attached, slot: str, value: RepresentationEdit) -> list[Place]:
    roles = tuple(role for role in value.target_modules if role != "block" and role not in SUBLAYERS)
    places = _places(tune, roles, slot) if roles else []
    for role in value.target_modules:
        if role == "block":
            places += [Place(name, "", role, i) for i, name in enumerate(tune.parts.block_modules)]
        elif role in SUBLAYERS:
            found = [i for i in range(tune.parts.blocks) if tune.parts.has_sublayer(SUBLAYERS[role], i)]
            if not found:
                raise _lacks(tune, slot, [role])
            places += [Place(tune.parts.sublayer(SUBLAYERS[role], i), "", role, i) for i in found]
    return places


def add_prompt(tune: Attached, slot: str, value: Prompt, services: Services) -> None:
    """Stand trained embeddings before every row."""
    if tune.prompt_length:
        raise LuthierError(f"`{slot}` is a second prompt", fix="use one prompt technique")
    table_VD = _embedded(tune)
    length = value.length
    if value.labels is not None:
        tune.prompt_labels = value.labels(services).cpu()
        length = len(tune.prompt_labels)
    tensors = value.start(table_VD, services)
    prompt = own(tune, Own(slot, None), tensors, rates=value.rates, frozen=value.frozen, wide=value.wide)
    for name, one in prompt.trained.items():
        # Embeddings do not belong near zero.
        one.decay = False
        if name in value.own_rates and services.now.run_rate:
            one.rate = value.own_rates[name] / services.now.run_rate
    site = tune.site(tune.parts.embedding)
    site.prompts.append((prompt, value))
    tune.prompt_length = length
    for place in tune.parts.by_block(None):
        # A further table that tokens are looked up in (Gemma 4) has no row for a prompt's: they get that of padding.
        table = tune.model.get_submodule(place.module)
        if isinstance(table, nn.Embedding) and place.role == "other":
            site.handles.append(table.register_forward_pre_hook(_without_virtual))


def _without_virtual(table: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ids as a table reads them whose first row is padding."""
    ids, *others = arguments
    return (ids.clamp(min=0), *others)


def _embedded(tune: Attached) -> Tensor:
    """The embeddings [V, D] as rows meet them: some models scale their table."""
    module = tune.model.get_submodule(tune.parts.embedding)
    table_VD = tune.model.get_parameter(f"{tune.parts.embedding}.weight").data
    scale = scale_of(module)
    return table_VD if scale is None else table_VD * scale


def add_prefix(tune: Attached, slot: str, value: Prefix, services: Services) -> None:
    """Let every query attend to trained keys and values as well."""
    prefix = own(tune, Own(slot, None), value.start(tune.parts, services), rates=value.rates, frozen=value.frozen)
    tune.prefixes.append((prefix, value))
    guard(tune)
    if tune.attention_handle is None:
        tune.attention_handle = use_context(tune.model, tune.parts, tune.context)


def _places(tune: Attached, names: tuple[str, ...], slot: str) -> list[Place]:
    places = tune.parts.select(names)
    if "head" in names:
        # An edit at a tied head stands at the head alone: the embedding does not see it.
        places += [Place(name, "weight", "head", None) for name in tune.parts.ties]
    if not places:
        raise _lacks(tune, slot, names)
    return places


def _lacks(tune: Attached, slot: str, names: Sequence[str]) -> LuthierError:
    return LuthierError(
        f"`{slot}` finds no place with the module types {', '.join(names)}",
        where=tune.parts.architecture,
        fix=f"this model has {', '.join(tune.parts.roles())}",
    )


def own(
    tune: Attached,
    owner: Owned,
    tensors: Tensors,
    *,
    form: Form = "factor",
    changes: bool = False,
    rates: Mapping[str, float] = {},
    axes: Mapping[str, int] = {},
    frozen: Container[str] = (),
    undecayed: Container[str] = (),
    wide: frozenset[str] = frozenset(),
) -> Owned:
    """Make a technique's tensors trained ones and give them to their owner, with those that do not train."""
    owner.wide = wide
    for name, values in tensors.items():
        if name in frozen:
            owner.frozen[name] = _own_values(tune, values)
            continue
        master = _own_values(tune, values).requires_grad_(True)
        trained = Trained(f"{owner.name}.{name}", owner.slot, owner.place, form, None, master, master, changes=changes)
        trained.rate, trained.axis = rates.get(name, 1.0), axes.get(name, 0)
        trained.decay = master.ndim > 1 and name not in undecayed
        owner.trained[name] = trained
        tune.register(trained)
    if owner not in tune.owns:
        tune.owns.append(owner)
    return owner


def _own_values(tune: Attached, values: Tensor) -> Tensor:
    """A copy in fp32 (fp64 for a model in fp64); whole numbers stay as they are."""
    live = next(tune.model.parameters())
    wide = values.dtype
    if values.is_floating_point():
        wide = torch.promote_types(torch.promote_types(values.dtype, live.dtype), torch.float32)
    return values.detach().to(live.device, wide, copy=True, memory_format=torch.contiguous_format)
