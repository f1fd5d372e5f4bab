"""LLaMA-Factory's configurations, with its `dataset_info.json` where it is found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.convert import common, lora, preferences, sources
from luthier.convert.config import Config, mapping
from luthier.convert.draft import Draft
from luthier.errors import LuthierError

_MARKS = """
stage finetuning_type cutoff_len template dataset lora_rank lora_target max_samples preprocessing_num_workers plot_loss pref_beta
pref_loss overwrite_cache quantization_bit dataset_dir freeze_trainable_layers use_galore pure_bf16
"""
MARKS = frozenset(_MARKS.split())
"""Keys by which such a file is recognized."""

STAGES = ("pt", "sft", "rm", "dpo", "kto")
LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
"""`pref_loss` to TRL's name, for those that are TRL's own."""
COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "pairs": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    "kto": {"prompt": "prompt", "response": "completion"},
    "sharegpt": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    "documents": {"prompt": "text"},
}
"""Of each format, the role of a column to luthier's key."""
BESIDE = {"system": "system", "tools": "tools", "history": "history"}
DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
"""The names of columns that a description leaves out."""


def convert(config: Config, devices: int) -> Draft:
    """A recipe of a file.

    Raises:
        LuthierError: it trains in a way that luthier does not, or a value is of the wrong type.
    """
    draft = Draft()
    stage = config.text("stage") or "sft"
    preferences.refuse_sampled(config, "stage", stage)
    if stage not in STAGES:
        raise LuthierError(f"`stage: {stage}` is not known", where=f"{config.where}: stage", fix=f"known: {', '.join(STAGES)}")
    common.run(config, draft)
    common.model(config, draft, "model_name_or_path", "model_revision")
    _tuned(config, draft)
    length = config.whole("cutoff_len") or 2048
    _rows(config, draft, stage, length)
    _objective(config, draft, stage)
    common.steps(config, draft, "num_train_epochs", 3.0)
    packed = [config.flag("packing"), config.flag("neat_packing")]
    blocks = any(packed) or (stage == "pt" and packed[0] is not False)
    each = 2 if stage in ("dpo", "rm") else 1
    common.batches(config, draft, "per_device_train_batch_size", 8, devices, length, blocks, each)
    common.learning_rate(config, draft, 5e-5, "transformers")
    common.schedule(config, draft, "lr_scheduler_type", "linear", 0)
    common.optimizer(config, draft, "optim")
    common.precision(config, draft)
    config.take("gradient_checkpointing")
    if not config.flag("disable_gradient_checkpointing"):
        draft.put("train.gradient_checkpointing", True, "LLaMA-Factory has it on by itself")
    return common.finished(config, draft)


def _tuned(config: Config, draft: Draft) -> None:
    kind = config.text("finetuning_type") or "lora"
    if kind == "lora":
        lora.quantized(config, draft)
        lora.lora(config, draft, "LLaMA-Factory", rank=8, alpha=None, dropout=0.0, everywhere=True)
    elif kind == "freeze":
        layers = config.whole("freeze_trainable_layers")
        layers = 2 if layers is None else layers
        draft.put("tune", "freeze_lower", f"`blocks` counts those that are frozen, from below: the model's number less {layers}")
        draft.leave("freeze_trainable_layers", layers, "give `freeze_lower` its `blocks`; by itself it freezes the lower half")
    elif kind == "full":
        draft.put("tune", "full")
    else:
        draft.put("tune", "lora", f"in place of {kind}")
        draft.leave("finetuning_type", kind, "`luthier techniques` lists what there is; LoRA stands in its place")


def _rows(config: Config, draft: Draft, stage: str, length: int) -> None:
    _data_sets(config, draft, config.names("dataset") or [], stage)
    if config.flag("streaming"):
        draft.put("rows.streaming", True, "rows are encoded into a file first, and read from there")
        if workers := config.whole("preprocessing_num_workers"):
            draft.put("rows.workers", workers)
    cut = "the end is cut; LLaMA-Factory shortens prompt and answer alike"
    draft.put("rows.max_length", length, "" if config.has("cutoff_len") else "the default of LLaMA-Factory")
    pairs = stage in ("dpo", "rm")
    if stage == "pt":
        draft.put("rows.blocks", {"tokens": length, "at": "token"}, sources.BLOCKS)
    else:
        draft.put("rows.too_long", "left" if pairs else "right", "prompts lose their beginning" if pairs else cut)
    if config.flag("train_on_prompt"):
        draft.put("rows.loss_on", "all")
    elif config.flag("mask_history"):
        draft.put("rows.loss_on", "last")
    if (thinks := config.flag("enable_thinking")) is not None:
        draft.put("rows.chat_template_options", {"enable_thinking": thinks}, "refused where the chat template does not read it")
    several = [config.names(key) for key in ("add_tokens", "add_special_tokens", "new_special_tokens")]
    common.new_tokens(draft, [token for tokens in several for token in tokens or ()])
    template = config.text("template")
    if template is not None and template != "default":
        draft.leave("template", template, "the tokenizer's own chat template writes the rows; check it with `luthier rows look`")
    measured = config.names("eval_dataset")
    described, folder = _described(config)
    files = [_source(draft, f"eval_dataset.{name}", described.get(name), name, folder) for name in measured or ()]
    sources.validation(draft, "val_size", config.number("val_size"), files)


def _data_sets(config: Config, draft: Draft, names: Sequence[str], stage: str) -> None:
    described, folder = _described(config)
    mixing, shares = config.text("mix_strategy"), config.names("interleave_probs")
    weights: list[float | None] = []
    try:
        weights = [float(one) for one in shares or ()]
    except ValueError:
        raise LuthierError(
            f"`interleave_probs` are {shares}", where=f"{config.where}: interleave_probs", fix="write a number for each data set"
        ) from None
    if weights and len(weights) != len(names):
        raise LuthierError(
            f"{len(names)} data sets have {len(weights)} probabilities",
            where=f"{config.where}: interleave_probs",
            fix="one for each",
        )
    found = []
    for name, weight in zip(names, weights or [None] * len(names), strict=True):
        columns = _columns(draft, name, described[name], stage) if name in described else {}
        found.append(sources.Source(_source(draft, f"dataset.{name}", described.get(name), name, folder), weight, columns))
    sources.put(draft, found)
    if mixing not in (None, "concat"):
        draft.note("rows.train", f"{mixing} there; here an epoch has as many rows as all sources together")
    unknown = [name for name in names if name not in described] if folder != "ONLINE" else []
    if unknown:
        draft.note("rows.train", "names of dataset_info.json, which was not found: name the files, or hub:OWNER/NAME")
        draft.leave("dataset", ",".join(unknown), f"{folder}/dataset_info.json does not tell where they lie")
    if most := config.whole("max_samples"):
        draft.leave("max_samples", most, "all rows are read: cut the files, or the run with `train.steps`")


def _described(config: Config) -> tuple[Mapping[str, Any], str]:
    """The descriptions of data sets and their folder, looked for from the working folder and beside the file."""
    folder = config.text("dataset_dir") or "data"
    for place in (Path(folder), Path(config.where).parent / folder):
        file = place / "dataset_info.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError as problem:
            raise LuthierError(f"this is no JSON: {problem}", where=str(file), fix="correct the file") from None
        if isinstance(found, dict):
            return {name: one for name, one in found.items() if isinstance(one, dict)}, str(place)
    return {}, folder


def _source(draft: Draft, key: str, described: Mapping[str, Any] | None, name: str, folder: str) -> str:
    if described is None:
        return sources.hub(name) if folder == "ONLINE" else name
    split, online = str(described.get("split") or "train"), described.get("hf_hub_url")
    for told in ("num_samples", "folder", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url"):
        if described.get(told) and not (online and told in ("ms_hub_url", "om_hub_url")):
            draft.leave(f"{key}.{told}", described[told])
    if online:
        return sources.hub(str(online), str(described.get("subset") or ""), split)
    return f"{folder}/{described.get('file_name') or name}"


def _columns(draft: Draft, name: str, described: Mapping[str, Any], stage: str) -> dict[str, str]:
    """Luthier's keys to those of one data set."""
    form = str(described.get("formatting") or "alpaca")
    given = {str(role): str(column) for role, column in mapping(described.get("columns")).items() if column}
    chosen = "documents" if stage == "pt" else form
    if form == "alpaca" and stage in ("dpo", "rm"):
        chosen = "pairs"
    elif form == "alpaca" and stage == "kto":
        chosen = "kto"
    known = {**COLUMNS.get(chosen, {}), **BESIDE}
    tags = mapping(described.get("tags"))
    if chosen == "sharegpt" and tags.get("role_tag") == "role":
        known["messages"] = "messages"
    for role, column in given.items():
        if role not in known and role != "kto_tag":
            why = "only text is read" if role in ("images", "videos", "audios") else "it has no place in rows of this kind"
            draft.leave(f"dataset.{name}.columns.{role}", column, why)
    strange = {tag: value for tag, value in tags.items() if value not in _TAGS.get(tag, ())}
    if strange:
        draft.leave(f"dataset.{name}.tags", strange, "name roles and turns in the rows as ShareGPT or OpenAI do")
    wanted = {role: column for role, column in {**DEFAULTS, **given}.items() if role in known}
    # Of the defaults, those that a row of this kind has at all; a description of columns replaces them all.
    return {known[role]: column for role, column in wanted.items() if role in given or not given}


def _tag(config: Config) -> str:
    """The column that says whether an answer is a good one."""
    described, _ = _described(config)
    named = [mapping(described[name].get("columns")).get("kto_tag") for name in config.names("dataset") or () if name in described]
    return str(next((one for one in named if one), "kto_tag"))


_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "system_tag": ("system",),
}
"""How turns are named that luthier reads as they are."""


def _objective(config: Config, draft: Draft, stage: str) -> None:
    given = config.number("pref_beta")
    beta = 0.1 if given is None else given
    losses: list[Any] = []
    if stage == "dpo":
        name = config.text("pref_loss") or "sigmoid"
        if name == "orpo":
            losses = [{"orpo": {"weight": beta}}]
        elif name == "simpo":
            losses = preferences.simpo(config, beta, 0.0)
        else:
            losses = preferences.pair_losses(config, draft, [LOSSES.get(name, name)], None, beta)
        if supervised := config.number("pref_ftx"):
            losses.append({"cross_entropy": {"weight": supervised}})
    elif stage == "kto":
        losses = [preferences.kto(config, beta)]
        # How the answers of its own data sets are marked.
        losses[0]["kto"]["column"] = _tag(config)
    elif stage == "rm":
        losses = [preferences.reward_model(config)]
    elif config.flag("use_dft_loss"):
        draft.put("token_weight", "dft")
    elif config.flag("use_asft_loss"):
        anchor = config.number("asft_alpha")
        losses = [{"asft": {"anchor": 0.1 if anchor is None else anchor}}]
    preferences.minimized(config, draft, losses)
