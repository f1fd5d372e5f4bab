"""Axolotl's configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.convert import common, lora, preferences, sources
from luthier.convert.config import Config, mapping
from luthier.convert.draft import Draft
from luthier.errors import LuthierError
from luthier.recipe.paths import TEMPLATES
from luthier.rows.messages import ROLES, SHAREGPT_ROLES

_MARKS = """
base_model sequence_len micro_batch_size num_epochs lr_scheduler adapter sample_packing val_set_size rl datasets
pretraining_dataset lora_target_linear lora_modules_to_save evals_per_epoch saves_per_epoch dataset_prepared_path train_on_inputs
wandb_project special_tokens chat_template flash_attention
"""
MARKS = frozenset(_MARKS.split())
"""Keys by which such a file is recognized."""

FIELDS = {"field_system": "system", "field_instruction": "instruction", "field_input": "input", "field_output": "output"}
PAIR_FIELDS = {"field_prompt": "prompt", "field_completion": "completion", "field_chosen": "chosen", "field_rejected": "rejected"}
PREPARED = {
    "intel": {"prompt": "question"},
    "icr": {"prompt": "input"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
}
"""What is read by the second half of a type such as `chatml.intel`: luthier's key to the file's."""
DOCUMENTS = frozenset({"completion", "pretrain"})
KINDS = ("alpaca", "chat_template", "sharegpt", "completion", "pretrain", "bradley_terry", "chatml", "llama3")
FORMS = ("", "default", "argilla", "argilla_chat", "intel", "icr", "ultra", "prompt_pairs", "chat_template")
"""Types of rows that luthier reads as they are, and what may stand behind their dot."""
KNOWN_MARKS = ("learn", "weight", "loss", "train", "training", "trainable")
_READ = """
type field field_messages field_tools field_chosen field_rejected text_column message_property_mappings
message_field_role message_field_content message_field_training roles_to_train train_on_eos train_on_eot roles
chat_template
"""
READ = tuple(_READ.split())
"""Keys of an entry of `datasets` that are dealt with here."""


def convert(config: Config, devices: int) -> Draft:
    """A recipe of a file.

    Raises:
        LuthierError: it trains in a way that luthier does not, or a value is of the wrong type.
    """
    draft = Draft()
    rl = (config.text("rl") or "").lower()
    preferences.refuse_sampled(config, "rl", rl)
    if config.flag("process_reward_model"):
        raise LuthierError(
            "no objective judges the steps of an answer", where=f"{config.where}: process_reward_model", fix="use reward_model"
        )
    common.run(config, draft)
    common.model(config, draft, "base_model", "revision_of_model", "model_revision")
    _tuned(config, draft)
    length = config.whole("sequence_len") or 512
    _rows(config, draft, rl, length)
    _objective(config, draft, rl)
    common.steps(config, draft, "num_epochs", 1.0)
    packed = bool(config.flag("sample_packing"))
    pairs = 2 if rl in ("dpo", "ipo", "orpo", "simpo") or config.has("reward_model") else 1
    common.batches(config, draft, "micro_batch_size", 1, devices, length, packed, pairs)
    common.learning_rate(config, draft)
    common.schedule(config, draft, "lr_scheduler", "cosine", None)
    common.optimizer(config, draft, "optimizer")
    common.precision(config, draft)
    checkpointing = config.take("gradient_checkpointing")
    if checkpointing:
        draft.put("train.gradient_checkpointing", True, "" if checkpointing is True else "nothing is offloaded to the processor")
    return common.finished(config, draft)


def _tuned(config: Config, draft: Draft) -> None:
    adapter = config.text("adapter")
    if adapter in ("lora", "qlora"):
        lora.quantized(config, draft, four=adapter == "qlora")
        lora.lora(config, draft, "Axolotl", rank=None, alpha=16, dropout=0.0, everywhere=False)
        return
    draft.put("tune", "full")
    if (trained := config.names("unfrozen_parameters")) is not None:
        draft.leave(
            "unfrozen_parameters", trained, "patterns of names; `tune: {full: {target_modules: [...]}}` names types of modules"
        )
        draft.note("tune", "everything trains: unfrozen_parameters is left out")
    if adapter is not None:
        draft.leave("adapter", adapter, "`luthier techniques` lists what there is; all parameters train in its place")
    for key in (
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_linear",
        "lora_target_modules",
        "load_in_8bit",
        "load_in_4bit",
    ):
        if config.take(key) is not None:
            draft.needless.append(key)


def _rows(config: Config, draft: Draft, rl: str, length: int) -> None:
    documents = config.parts("pretraining_dataset")
    entries = documents or config.parts("datasets")
    key = "pretraining_dataset" if documents else "datasets"
    found = []
    for place, one in enumerate(entries or ()):
        columns = _columns(draft, f"{key}[{place}]", one, rl)
        found += [sources.Source(rows, columns=columns) for rows in sources.source(draft, f"{key}[{place}]", one, READ)]
    sources.put(draft, found)
    types = [one.get("type") for one in entries or ()]
    names = {str(one).partition(":")[0].partition(".")[0] for one in types if isinstance(one, str)}
    if "alpaca" in names:
        draft.note(
            "rows.train", "instructions are written by the model's chat template; Axolotl writes Alpaca's own words around them"
        )
    if documents or config.flag("streaming"):
        draft.put("rows.streaming", True, "rows are encoded into a file first, and read from there")
    draft.put("rows.max_length", length, "" if config.has("sequence_len") else "the default of Axolotl")
    if names & DOCUMENTS:
        draft.put("rows.blocks", {"tokens": length, "at": "token"}, sources.BLOCKS)
    if not names or names - DOCUMENTS:
        _too_long(config, draft)
    if config.flag("train_on_inputs"):
        draft.put("rows.loss_on", "all")
    tests = config.parts("test_datasets")
    files: list[str] = []
    for place, one in enumerate(tests or ()):
        files += sources.source(draft, f"test_datasets[{place}]", one, READ)
        renamed = {ours: theirs for ours, theirs in _columns(draft, f"test_datasets[{place}]", one, rl).items() if ours != theirs}
        if renamed not in ({}, draft.values.get("rows.columns")):
            draft.leave(f"test_datasets[{place}]", renamed, "`rows.columns` are those of the training rows: rename the keys")
    sources.validation(draft, "val_set_size", config.number("val_set_size"), files)
    tokens = (config.parts("special_tokens") or [{}])[0]
    if "pad_token" in tokens:
        draft.needless.append("special_tokens.pad_token")
    if others := {name: one for name, one in tokens.items() if name != "pad_token" and one}:
        draft.leave("special_tokens", others)
    common.new_tokens(draft, config.names("tokens"))
    template = config.text("chat_template")
    own = config.text("chat_template_jinja")
    if own is not None and own.endswith(TEMPLATES):
        template = own
    elif own is not None:
        draft.leave("chat_template_jinja", own, "write it into a file FILE.jinja, and name that: rows.chat_template")
    if template == "chatml" or (template is not None and template.endswith(TEMPLATES)):
        draft.put("rows.chat_template", template)
    elif template is not None and template != "tokenizer_default":
        draft.leave(
            "chat_template", template, "the tokenizer's own chat template writes the rows; check it with `luthier rows look`"
        )


def _too_long(config: Config, draft: Draft) -> None:
    strategy = config.text("excess_length_strategy") or "drop"
    if strategy == "truncate":
        draft.put("rows.too_long", "right")
    elif strategy not in ("drop", "raise"):
        draft.leave("excess_length_strategy", strategy)
    elif strategy == "drop":
        draft.put("rows.on_bad_row", "skip", "rows that are too long are left out, as there; so are broken ones, all counted")


def _columns(draft: Draft, key: str, entry: Mapping[str, Any], rl: str) -> dict[str, str]:
    """Luthier's keys to those of one data set."""
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        named = {**FIELDS, **PAIR_FIELDS, "field_label": "label"}
        for name, value in kind.items():
            if name not in named and value:
                draft.leave(f"{key}.type.{name}", value, "rows are written by the model's chat template")
        return {named[name]: str(value) for name, value in kind.items() if name in named and value}
    found: dict[str, str] = {}
    base, _, form = str(kind or "").partition(":")[0].partition(".")
    if base in ("completion", "pretrain"):
        found["text"] = str(entry.get("field") or entry.get("text_column") or "text")
    elif base == "bradley_terry":
        found["prompt"] = "input"
    elif rl and base == "chat_template":
        found |= {"prompt": str(entry.get("field_messages") or "messages")} if form == "default" else {}
    elif rl:
        found |= {ours: theirs for ours, theirs in PREPARED.get(form, {}).items() if ours == "prompt" or rl != "kto"}
    elif entry.get("field_messages"):
        found[_messages_key(entry)] = str(entry["field_messages"])
    for name, ours in (("field_chosen", "chosen"), ("field_rejected", "rejected"), ("field_tools", "tools")):
        if entry.get(name):
            found[ours] = str(entry[name])
    _turns(draft, key, entry)
    if base not in KINDS or form not in FORMS:
        draft.leave(
            f"{key}.type", kind, "rows are told by their keys, and written by the model's chat template: see `luthier rows look`"
        )
    return found


def _messages_key(entry: Mapping[str, Any]) -> str:
    """`conversations` for turns in ShareGPT's spelling, `{from, value}`, else `messages`."""
    role = mapping(entry.get("message_property_mappings")).get("role")
    return "conversations" if (role or entry.get("message_field_role")) == "from" else "messages"


def _turns(draft: Draft, key: str, entry: Mapping[str, Any]) -> None:
    """Which turns are learned, and who says them."""
    learned = entry.get("roles_to_train")
    if learned not in (None, ["assistant"], ["gpt"]):
        draft.leave(f"{key}.roles_to_train", learned, "the assistant's turns are learned, or with `rows.loss_on: all` every one")
    for name in ("train_on_eos", "train_on_eot"):
        if entry.get(name) not in (None, "turn"):
            draft.leave(f"{key}.{name}", entry[name], "the token that ends a learned turn is learned, and no other")
    mark = entry.get("message_field_training")
    if mark is not None and mark not in KNOWN_MARKS:
        draft.leave(f"{key}.message_field_training", mark, "rename it in the rows to `learn`")
    spelling = {"role": entry.get("message_field_role"), "content": entry.get("message_field_content")}
    spelling |= mapping(entry.get("message_property_mappings"))
    strange = {
        name: value for name, value in spelling.items() if value not in (None, name, {"role": "from", "content": "value"}.get(name))
    }
    if strange:
        draft.leave(
            f"{key}.message_property_mappings", strange, "`role` and `content`, or `from` and `value`: rename them in the rows"
        )
    speakers = {who: names for who, names in mapping(entry.get("roles")).items() if not _read(who, names)}
    if speakers:
        draft.leave(
            f"{key}.roles",
            speakers,
            f"these are read: {', '.join(sorted({*ROLES, *SHAREGPT_ROLES}))}; rename the others in the rows",
        )
    if entry.get("chat_template") not in (None, "tokenizer_default"):
        draft.leave(f"{key}.chat_template", entry["chat_template"], "the tokenizer's own chat template writes the rows")


def _read(who: str, names: Any) -> bool:
    """Whether luthier takes the same names for the same speaker."""
    several = names if isinstance(names, list) else [names]
    return all(SHAREGPT_ROLES.get(str(one), str(one) if one in ROLES else "") == who for one in several)


def _objective(config: Config, draft: Draft, rl: str) -> None:
    grouped = config.parts("trl") or [{}]
    inner = Config(grouped[0], f"{config.where}: trl")
    given = inner.number("beta")
    given = config.number("rl_beta", "dpo_beta") if given is None else given
    for key, value in inner.rest().items():
        draft.leave(f"trl.{key}", value)
    beta = 0.1 if given is None else given
    losses: list[Any] = []
    if rl == "dpo":
        weights = config.take("dpo_loss_weights")
        losses = preferences.pair_losses(config, draft, config.names("dpo_loss_type") or ["sigmoid"], weights, beta)
    elif rl == "ipo":
        losses = preferences.pair_losses(config, draft, ["ipo"], None, beta)
    elif rl == "kto":
        losses = [preferences.kto(config, beta)]
    elif rl == "orpo":
        weight = config.number("orpo_alpha") if given is None else given
        losses = [{"orpo": {"weight": beta if weight is None else weight}}]
    elif rl == "simpo":
        supervised = config.number("cpo_alpha")
        losses = preferences.simpo(config, beta, 1.0 if supervised is None else supervised)
    elif rl:
        raise LuthierError(f"`rl: {rl}` has no counterpart", where=f"{config.where}: rl", fix="write the recipe by hand")
    elif config.flag("reward_model"):
        losses = [preferences.reward_model(config)]
        if config.data.get("num_labels") == 1:
            config.take("num_labels")
            draft.needless.append("num_labels")
    preferences.minimized(config, draft, losses)
