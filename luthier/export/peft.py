"""Adapters in PEFT's file format, written without PEFT; those of LoRA are read as well."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier.delta import Delta
from luthier.delta.forms import LowRank, combine
from luthier.errors import LuthierError, nearest
from luthier.export import peft_parameters
from luthier.export.folder import new_folder
from luthier.export.model import check_tokenizer, dtype_of, write_texts
from luthier.export.peft_adapter import CONFIG, PREFIX, TENSORS, Adapter, write_adapter
from luthier.export.peft_base import base_of
from luthier.export.peft_beside import WEIGHTS_ALONE, writer_of
from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.kinds.parts import Parts
from luthier.machine import versions
from luthier.methods.weight_delta.lora import lora
from luthier.models.fingerprint import fingerprint as fingerprint_of
from luthier.models.load import ModelSource
from luthier.models.quiet import quiet
from luthier.tune import Tune
from luthier.tune.each import of_expert
from luthier.tune.sites import Addition

_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "modules_to_save",
    "monteclora_config", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "velora_config",
)  # fmt: skip
"""Options of PEFT that make an adapter more, or other, than `scale * B @ A`."""
_STARTS_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Factors(NamedTuple):
    """The adapter of one parameter: the change of a weight is `scale * up @ down`, that of a stack of E experts' matrices has a pair of
    factors for each, down [E, R, I] and up [E, O, R]."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down_RI.shape[-2]


def export_peft(
    tune: Tune,
    folder: str | Path,
    base: ModelSource | str,
    *,
    fingerprint: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write what trains as a PEFT adapter: low-rank deltas, or a prompt, a prefix or factors of channels.

    Of deltas, parts of a fused projection become one adapter whose `lora_B` is zero where a part does not reach. Scales are
    written as `lora_alpha = scale * rank`, also for rank-stabilized ones, so any version of PEFT computes the same
    scale. Deltas that are low-rank in another way than LoRA's are written by the factors their technique makes of them.

    Args:
        tune: with low-rank deltas only, or one technique of `peft_beside.WRITERS`; not merged.
        folder: must not exist.
        base: where the base's weights come from, or its name. What is written is what others find these very weights by, the hub's
            name and revision, and nothing where they are not there; in any case their fingerprint, in base.json.
        fingerprint: of the base, where it is known, to be compared with the weights. What is written is that of the
            weights.
        tokenizer: saved beside the adapter, with its exact chat template.
        dtype: of the adapter's tensors; none: as they were trained.
        texts: files of text that belong beside them, by name.

    Returns:
        `peft_type`, `base`, its name on the hub or where it comes from, `base_fingerprint`, `base_dtype`, the type it was trained in,
        where alone the logits are those of the run, `note`, where there is something to know of the base, and `modules` (how many) for
        LORA and IA3, `ranks` (modules by rank) for LORA, `tokens` for PROMPT_TUNING and PREFIX_TUNING.

    Raises:
        LuthierError: the folder exists, the tune holds something that PEFT cannot, or its weights are not the base's.
    """
    if tune.merged is not None:
        raise LuthierError("the model is merged", where="export_peft", fix="call unmerge() first")
    beside = writer_of(tune)
    if beside is None:
        _refuse_other_kinds(tune)
    with tune.at("base"):
        untouched = fingerprint_of(tune.model)
    live = fingerprint_of(tune.model)
    if live != untouched or fingerprint not in (None, live):
        raise LuthierError(
            "numbers of the model itself changed, and an adapter would lose that",
            where="export_peft",
            fix="export the model" if beside is None else WEIGHTS_ALONE,
        )
    adapter = (beside or _low_rank)(tune)
    named = base_of(base)
    common = {
        "task_type": "CAUSAL_LM" if tune.parts.causal else "FEATURE_EXTRACTION",
        "inference_mode": True,
        **named.config(),
    }
    metadata = {"luthier": versions()["luthier"], "base_fingerprint": live}
    with new_folder(Path(folder)) as place:
        write_adapter(place, adapter._replace(config={**adapter.config, **common}), metadata, dtype)
        named.write(place, live, dtype_of(tune.model))
        if tokenizer is not None:
            with quiet():
                tokenizer.save_pretrained(place)
            check_tokenizer(tokenizer, place)
        write_texts(place, texts)
    note = {"note": named.note} if named.note else {}
    return {
        "peft_type": adapter.config["peft_type"],
        **adapter.facts,
        "base": named.hub or named.origin,
        "base_fingerprint": live,
        "base_dtype": dtype_of(tune.model),
        **note,
    }


def load_peft(folder: str | Path, tune: Tune, *, force: bool = False) -> WeightDelta:
    """A PEFT LoRA adapter as a technique: `tune.add(slot, load_peft(folder, tune), services, {})` attaches it.

    Where the adapter has nothing for a place of the roles it reaches, the delta has rank 0. An adapter of a fused
    projection is cut into the parts luthier knows, which share the values of `lora_A` at the start and train on their
    own. One of `target_parameters` reaches routers and each expert of a stack.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        tune: on the adapter's base.
        force: also on another base than the adapter names by fingerprint (only luthier's own adapters do).

    Raises:
        LuthierError: the folder holds no LoRA adapter, one that is more than `scale * B @ A`, a module that the model
            does not have or has in another shape, or the base is another.
    """
    path = Path(folder)
    config = _read_config(path)
    tensors, metadata = _read_tensors(path)
    if not force:
        _check_base(tune, metadata.get("base_fingerprint"), config.get("base_model_name_or_path"), path)
    held = _factors(_without_base(tensors, tune, path), config, tune, path)
    places = {parameter: _places(tune, parameter, factors, path) for parameter, factors in held.items()}
    scale = next(iter(held.values())).scale

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        width_out, width_in = weight_OI.shape
        if place.parameter not in held:
            return {"down": torch.zeros(0, width_in), "up": torch.zeros(width_out, 0)}
        factors = held[place.parameter]
        down_RI, up_OR = of_expert(factors.down_RI, services), of_expert(factors.up_OR, services)[place.start : place.stop]
        return {"down": down_RI, "up": up_OR if factors.scale == scale else up_OR * (factors.scale / scale)}

    roles = tuple(dict.fromkeys(place.role for found in places.values() for place in found))
    # Its factors come from `start`, so the rank only serves to scale by alpha itself.
    same = lora(rank=1, alpha=scale, dropout=config["lora_dropout"])
    return same._replace(start=start, target_modules=roles)


def parted(delta: Delta, parts: Parts) -> tuple[Delta, WeightDelta | None]:
    """A delta's changes of single numbers, and its low-rank ones as a technique that can stand beside the weights.

    Args:
        delta: of a run.
        parts: the base's map.
    """
    inside = {name: tuple(form for form in forms if not isinstance(form, LowRank)) for name, forms in delta.changes.items()}
    low: dict[tuple[str, int | None, int | None], LowRank] = {}
    for name, forms in delta.changes.items():
        for form in combine(form for form in forms if isinstance(form, LowRank)):
            assert isinstance(form, LowRank)
            low[name, form.start, form.stop] = form
    rest = replace(delta, changes={name: forms for name, forms in inside.items() if forms})
    places = [place for place in parts.places if (place.parameter, place.start, place.stop) in low]
    if not places:
        return rest, None

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        form = low.get((place.parameter, place.start, place.stop))
        if form is None:
            return {"down": weight_OI.new_zeros(0, weight_OI.shape[1]), "up": weight_OI.new_zeros(len(weight_OI), 0)}
        return {"down": of_expert(form.down_RI, services), "up": form.scale * of_expert(form.up_OR, services)}

    roles = tuple(dict.fromkeys(place.role for place in places))
    return rest, lora(rank=1, alpha=1.0)._replace(start=start, target_modules=roles)


def _refuse_other_kinds(tune: Tune) -> None:
    """Raise if something that trains is no low-rank delta. What an objective trained for itself is not part of the model."""
    low_rank = [one for one in tune.additions if _has_factors(one.value) and not one.value.subtract]
    held = {trained.name for one in low_rank for trained in one.trained.values()}
    other = next((one.slot for one in tune.trained.values() if one.name not in held and one.form != "free"), None)
    if other is not None:
        raise LuthierError(
            f"`{other}` is no low-rank delta that PEFT could add to the base",
            where="export_peft",
            fix="export the model, or keep the delta",
        )


def _has_factors(value: WeightDelta) -> bool:
    return value.pair is not None or value.factors is not None


def _factors_at(one: Addition) -> Factors:
    """The factors of one delta: its own tensors, or what its technique makes of them."""
    tensors = one.masters()
    if one.value.factors is not None:
        return Factors(*one.value.factors(tensors), 1.0)
    assert one.value.pair is not None
    down, up = one.value.pair
    return Factors(tensors[down], tensors[up], one.value.scale)


def _by_parameter(tune: Tune) -> dict[Place, Factors]:
    """One pair of factors for each whole parameter that has any."""
    groups: dict[Place, list[tuple[Place, Factors]]] = {}
    for one in tune.additions:
        assert one.place is not None
        factors = _factors_at(one)
        if factors.rank:
            groups.setdefault(one.place._replace(role="", start=None, stop=None), []).append((one.place, factors))
    if not groups:
        raise LuthierError("nothing low-rank stands beside the weights", where="export_peft", fix="export the model")
    return {place: _joined(tune, group) for place, group in groups.items()}


def _joined(tune: Tune, group: Sequence[tuple[Place, Factors]]) -> Factors:
    """The factors of all deltas at one parameter side by side, each reaching its own outputs."""
    downs, ups = [], []
    scale = group[0][1].scale
    for place, factors in group:
        outputs = tune.region(place._replace(start=None, stop=None)).shape[-2]
        wide_OR = factors.up_OR.new_zeros(*factors.up_OR.shape[:-2], outputs, factors.rank)
        wide_OR[..., place.start : place.stop, :] = (
            factors.up_OR if factors.scale == scale else factors.up_OR * (factors.scale / scale)
        )
        downs.append(factors.down_RI)
        ups.append(wide_OR)
    return Factors(torch.cat(downs, dim=-2), torch.cat(ups, dim=-1), scale)


def _low_rank(tune: Tune) -> Adapter:
    """Low-rank deltas, as LORA."""
    held = _by_parameter(tune)
    tensors: dict[str, Tensor] = {}
    wrapped = {place: peft_parameters.is_wrapped(tune.model, place) for place in held}
    for place, factors in held.items():
        name, down, up = f"{PREFIX}{place.module}", factors.down_RI, factors.up_OR
        if wrapped[place]:
            others = [one.tensor for one in held if one.module == place.module]
            name += peft_parameters.nested(tune.model, place, others)
            down, up = peft_parameters.flat(tune.model, place, down, up)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    ranks = Counter(factors.rank for factors in held.values())
    named = {place.parameter if wrapped[place] else place.module: factors for place, factors in held.items()}
    parameters = [place.parameter for place in held if wrapped[place]]
    config = _config(tune, named, parameters)
    return Adapter(config, tensors, {"modules": len({place.module for place in held}), "ranks": dict(sorted(ranks.items()))})


def _config(tune: Tune, named: Mapping[str, Factors], parameters: Sequence[str]) -> dict[str, Any]:
    rank = Counter(factors.rank for factors in named.values()).most_common(1)[0][0]
    alpha = Counter(factors.scale * factors.rank for factors in named.values()).most_common(1)[0][0]
    # PEFT reads the names in these two as regular expressions.
    ranks = {re.escape(name): factors.rank for name, factors in named.items() if factors.rank != rank}
    alphas = {name: factors.scale * factors.rank for name, factors in named.items()}
    modules = [name for name in named if name not in parameters]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(name in tune.parts.transposed for name in modules),
        "target_modules": modules,
        **({"target_parameters": list(parameters)} if parameters else {}),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LuthierError(f"the adapter cannot be read: {error}", where=str(path), fix="name a PEFT adapter's folder") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise LuthierError(f"this is no LoRA adapter but `{kind}`", where=str(path), fix="only LoRA adapters are read")
    start = config.get("init_lora_weights")
    refused = [f"{key}: {config[key]}" for key in _REFUSED if config.get(key)]
    refused += [f"bias: {config['bias']}"] if config.get("bias", "none") != "none" else []
    refused += [f"init_lora_weights: {start}"] if str(start).startswith(_STARTS_CHANGING_THE_BASE) else []
    if refused:
        raise LuthierError(
            f"the adapter is more than two factors beside the base ({refused[0]})",
            where=str(path),
            fix="merge it with PEFT and name the merged model",
        )
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float):
        raise LuthierError(f"the dropout is {dropout!r}", where=f"{path}: lora_dropout", fix="use a number")
    return {**config, "lora_dropout": float(dropout)}


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / TENSORS
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise LuthierError(
            "the adapter is pickled, and unpickling runs whatever code the file holds",
            where=str(folder),
            fix="if you trust the file, load it with PEFT and save it again, which writes safetensors",
        )
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LuthierError(f"the adapter cannot be read: {error}", where=str(path), fix="copy it again") from error


def _check_base(tune: Tune, wanted: str | None, name: str | None, folder: Path) -> None:
    if wanted is None:
        return
    with tune.at("base"):
        found = fingerprint_of(tune.model)
    if found != wanted:
        raise LuthierError(
            f"the adapter belongs to {name or 'another model'} ({wanted[:12]}), and this model is {found[:12]}",
            where=str(folder),
            fix="load the adapter's base in the same type, or force it if you know better",
        )


def _without_base(tensors: Mapping[str, Tensor], tune: Tune, folder: Path) -> dict[str, Tensor]:
    """The tensors that are factors. PEFT saves embedding or head along where an adapter stands; it must be the model's.

    Raises:
        LuthierError: such a tensor is another than the model's.
    """
    weights = tune.model.state_dict()
    factors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        base = weights.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base is None:
            factors[name] = tensor
        elif not torch.equal(base, tensor.to(base.device, base.dtype)):
            raise LuthierError(
                f"the adapter comes with other numbers for `{name}` than the model has",
                where=str(folder),
                fix="merge the adapter with PEFT and name the merged model",
            )
    return factors


def _factors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], tune: Tune, folder: Path) -> dict[str, Factors]:
    """The factors of every parameter that an adapter changes, by name, with PEFT's scale."""
    known = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = known.fullmatch(name)
        if match is None:
            raise LuthierError(f"`{name}` is no factor of a linear map", where=str(folder), fix="merge the adapter with PEFT")
        found.setdefault(match[1], {})[match[2]] = tensor
    broken = [m for m, pair in found.items() if set(pair) != {"A", "B"} or any(one.ndim != 2 for one in pair.values())]
    if broken or not found:
        where = broken[0] if broken else str(folder)
        raise LuthierError("the adapter lacks a factor, or it is no matrix", where=where, fix="copy the adapter again")
    targets = config.get("target_parameters") or ()
    factors: dict[str, Factors] = {}
    for name, pair in found.items():
        place = peft_parameters.place_of(tune.model, tune.parts, name, targets)
        if place is None:
            scale = _scale(name, pair["A"].shape[0], config, folder)
            factors[f"{name}.weight"] = Factors(pair["A"], pair["B"], scale)
        else:
            down, up = peft_parameters.stacked(tune.model, place, pair["A"], pair["B"], folder)
            factors[place.parameter] = Factors(down, up, _scale(place.parameter, down.shape[-2], config, folder))
    return factors


def _scale(module: str, rank: int, config: Mapping[str, Any], folder: Path) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as error:
            raise LuthierError(
                f"`{pattern}` is no pattern: {error}", where=f"{folder / CONFIG}: alpha_pattern", fix="correct it"
            ) from error
        if matches:
            alpha = value
            break
    if not isinstance(alpha, int | float) or not rank:
        raise LuthierError(f"alpha is {alpha!r} at rank {rank}", where=module, fix="correct the adapter's configuration")
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _places(tune: Tune, parameter: str, factors: Factors, folder: Path) -> list[Place]:
    """Where a parameter that an adapter changes is in the model."""
    module = parameter.rpartition(".")[0]
    places = [place for place in tune.parts.places if place.parameter == parameter]
    if not places and module in tune.parts.ties and module == tune.parts.head:
        places = [Place(module, "weight", "head", None)]
    if not places:
        raise LuthierError(
            f"the adapter is for a module `{module}` that the model does not have",
            where=str(folder),
            fix=nearest(module, {place.module for place in tune.parts.places}) or "load the adapter's base",
        )
    shape = tune.region(places[0]._replace(start=None, stop=None)).shape
    experts, (outputs, inputs) = shape[:-2], shape[-2:]
    if (*factors.up_OR.shape, *factors.down_RI.shape) != (*experts, outputs, factors.rank, *experts, factors.rank, inputs):
        found = f"{tuple(factors.up_OR.shape)} and {tuple(factors.down_RI.shape)}"
        raise LuthierError(
            f"factors of shape {found} do not fit a weight of shape {tuple(shape)}",
            where=module,
            fix="load the adapter's base",
        )
    return places
