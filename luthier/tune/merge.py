"""Folding what stands beside the weights into them, and taking it out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds import Place
from luthier.models.embedding import scale_of
from luthier.models.quantized import expand, put
from luthier.tune.attached import Attached
from luthier.tune.sites import Edit


def merge(tune: Attached) -> None:
    """Fold every delta and edit into the weights, computed in fp32.

    Quantized weights become dense ones of the same numbers for as long: rounding the sum to codes again would lose most of a delta.

    Raises:
        LuthierError: already merged, or something here is no change of a weight (a prompt, a prefix, a non-linear edit).
    """
    if tune.merged is not None:
        raise LuthierError("the model is merged already", fix="call unmerge() first")
    refuse_unmergeable(tune)
    tune.expanded = expand(tune.model, next(tune.model.parameters()).dtype)
    tune.merged = {}
    try:
        _fold_all(tune)
    except BaseException:
        # Half merged, the model would be neither.
        unmerge(tune)
        raise


def _fold_all(tune: Attached) -> None:
    for site in tune.sites.values():
        for addition in site.additions:
            assert addition.place is not None
            _remember(tune, addition.place.parameter)
            values = tune.region(addition.place)
            delta_OI = addition.delta(addition.masters())
            values.copy_(values.to(torch.promote_types(values.dtype, delta_OI.dtype)) + delta_OI)
        # What edits an input last stands next to the weight.
        inputs = [edit for edit in site.edits if edit.value.of == "input"]
        outputs = [edit for edit in site.edits if edit.value.of == "output"]
        for edit in (*reversed(inputs), *outputs):
            if edit.stands:
                _fold(tune, edit)


def refuse_unmergeable(tune: Attached) -> None:
    """Raise if something that trains cannot become part of the weights."""
    blockers = [f"the prompt `{own.slot}`" for site in tune.sites.values() for own, _ in site.prompts]
    blockers += [f"the prefix `{own.slot}`" for own, _ in tune.prefixes]
    blockers += [
        f"the edit `{edit.slot}` at {edit.place}"
        for site in tune.sites.values()
        for edit in site.edits
        if edit.stands and not _folds(tune, edit)
    ]
    blockers += [
        f"the delta `{addition.slot}` at the tied {addition.place}"
        for addition in tune.additions
        if addition.place is not None and addition.place.module in tune.parts.ties
    ]
    if blockers:
        raise LuthierError(
            f"{blockers[0]} cannot be merged into the weights", fix="export it as an adapter, or keep it beside the model"
        )


def lacking_bias(tune: Attached) -> list[str]:
    """The techniques, by slot, whose edits would fold into a bias that the model lacks: what they learn stays beside the weights."""
    found: dict[str, bool] = {}
    for site in tune.sites.values():
        if getattr(site.module, "bias", None) is None:
            for edit in site.edits:
                if not found.get(edit.slot) and edit.value.fold is not None and edit.place is not None and edit.place.tensor:
                    found[edit.slot] = edit.value.fold(edit.masters(), tune.region(edit.place), None)[1] is not None
    return [slot for slot, lacks in found.items() if lacks]


def _folds(tune: Attached, edit: Edit) -> bool:
    """Whether an edit is a change of its module's own weight: not of one that another module reads as well."""
    place = edit.place
    if edit.value.fold is None or place is None or not place.tensor:
        return False
    scale = scale_of(tune.model.get_submodule(place.module))
    return place.module not in (*tune.parts.ties, *tune.parts.ties.values()) and scale in (None, 1.0)


def _fold(tune: Attached, edit: Edit) -> None:
    assert edit.place is not None and edit.value.fold is not None
    place = edit.place
    module = tune.model.get_submodule(place.module)
    bias = getattr(module, "bias", None)
    _remember(tune, place.parameter)
    values = tune.region(place)
    wide = torch.promote_types(values.dtype, torch.float32)
    part = slice(place.start, place.stop)
    old_bias = None if bias is None else bias.data[part].to(wide)
    beyond = _beyond_weight(module, values)
    weight_OI, bias_O = edit.value.fold(edit.masters(), values.to(wide) + beyond, old_bias)
    values.copy_(weight_OI - beyond)
    if bias_O is not None:
        if bias is None:
            raise LuthierError(
                f"`{edit.slot}` needs a bias that this model lacks", where=str(place), fix="keep it beside the model"
            )
        _remember(tune, Place(place.module, "bias", place.role, place.block).parameter)
        bias.data[part].copy_(bias_O)


def _beyond_weight(module: nn.Module, weight: Tensor) -> float:
    """What a module multiplies by beyond its weight: 1 for norms that hold the difference from 1 (Gemma), else 0.

    It is asked of the norm itself, which without its weight would give zeros: no configuration tells it.
    """
    if weight.ndim != 1:
        return 0.0
    probe = torch.linspace(-1.0, 1.0, len(weight), dtype=weight.dtype, device=weight.device)
    nothing = {name: torch.zeros_like(values) for name, values in module.named_parameters()}
    with torch.no_grad():
        return float(bool(torch.func.functional_call(module, nothing, (probe,)).any()))


def _remember(tune: Attached, name: str) -> None:
    assert tune.merged is not None
    # What stands for a quantized weight is dropped afterwards.
    stands_in = name.endswith(".weight") and name.removesuffix(".weight") in tune.expanded
    if name not in tune.merged and not stands_in:
        tune.merged[name] = tune.model.get_parameter(name).data.clone()


def unmerge(tune: Attached) -> None:
    """Put back the weights as they were before merging, bit for bit."""
    if tune.merged is None:
        raise LuthierError("the model is not merged", fix="call merge() first")
    values: Tensor
    for name, values in tune.merged.items():
        tune.model.get_parameter(name).data.copy_(values)
    put(tune.model, tune.expanded)
    tune.expanded, tune.merged = {}, None
