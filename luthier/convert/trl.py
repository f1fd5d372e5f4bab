"""Configurations that `trl sft --config` and the other scripts of TRL read."""

from __future__ import annotations

from typing import Any, Literal

from luthier.convert import common, lora, preferences, sources
from luthier.convert.config import Config
from luthier.convert.draft import Draft

_MARKS = """
dataset_name dataset_config dataset_train_split dataset_test_split use_peft assistant_only_loss completion_only_loss max_length
padding_free packing_strategy loss_type precompute_ref_log_probs dataset_text_field lora_r torch_dtype dtype
per_device_train_batch_size test_split_size dataset_streaming
"""
MARKS = frozenset(_MARKS.split())
"""Keys by which such a file is recognized."""

Script = Literal["sft", "dpo", "kto", "reward"]
RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "reward": 1e-4}
"""TRL's learning rates where a file names none."""
READ = ("fraction",)


def script_of(config: Config) -> Script:
    """Which script a file is for, by keys that only one of them reads."""
    losses = config.data.get("loss_type")
    named = {str(one) for one in (losses if isinstance(losses, list) else [losses])}
    if any(map(config.has, ("desirable_weight", "undesirable_weight"))) or named & {"kto", "apo_zero_unpaired"}:
        return "kto"
    if config.has("center_rewards_coefficient") or config.data.get("lora_task_type") == "SEQ_CLS":
        return "reward"
    of_pairs = (
        "precompute_ref_log_probs",
        "sync_ref_model",
        "f_divergence_type",
        "ld_alpha",
        "loss_weights",
        "beta",
        "label_smoothing",
    )
    return "dpo" if named & set(preferences.PAIRS) or any(map(config.has, of_pairs)) else "sft"


def convert(config: Config, devices: int, script: Script | None = None) -> Draft:
    """A recipe of a file.

    Raises:
        LuthierError: it trains in a way that luthier does not, or a value is of the wrong type.
    """
    draft = Draft()
    told, script = script, script or script_of(config)
    common.run(config, draft)
    common.model(config, draft, "model_name_or_path", "model_revision")
    _tuned(config, draft)
    # `max_length: null` means the whole row, and is no key that is left out.
    length = config.whole("max_length", "max_seq_length")
    if length is None and "max_length" not in config.data:
        length = 1024
    _rows(config, draft, script, length)
    _objective(config, draft, script, "" if told else f"for `trl {script}`, as its keys suggest; else --from trl-dpo or the like")
    common.steps(config, draft, "num_train_epochs", 3.0)
    processes = config.whole("num_processes") if devices == 1 else None
    packed = script == "sft" and bool(config.flag("packing"))
    each = 2 if script in ("dpo", "reward") else 1
    common.batches(config, draft, "per_device_train_batch_size", 8, processes or devices, length, packed, each)
    common.learning_rate(config, draft, RATES[script], f"`trl {script}`")
    common.schedule(config, draft, "lr_scheduler_type", "linear", 0)
    common.optimizer(config, draft, "optim")
    _precision(config, draft)
    if config.flag("gradient_checkpointing") is not False:
        draft.put("train.gradient_checkpointing", True, "" if config.has("gradient_checkpointing") else "on in TRL")
    return common.finished(config, draft)


def _tuned(config: Config, draft: Draft) -> None:
    if config.flag("use_peft"):
        lora.quantized(config, draft)
        lora.lora(config, draft, "TRL", rank=16, alpha=32, dropout=0.05, everywhere=False)
    else:
        draft.put("tune", "full")


def _rows(config: Config, draft: Draft, script: Script, length: int | None) -> None:
    entries = config.parts("datasets")
    name, part, split = config.text("dataset_name"), config.text("dataset_config"), config.text("dataset_train_split")
    field = config.text("dataset_text_field")
    columns = {"text": field} if field is not None else {}
    found = []
    for place, one in enumerate(entries or ([{"path": name, "name": part, "split": split}] if name else [])):
        key = f"datasets[{place}]" if entries else "dataset_name"
        found += [sources.Source(rows, one.get("fraction"), columns) for rows in sources.source(draft, key, one, READ)]
    sources.put(draft, found)
    if config.flag("dataset_streaming", "streaming"):
        draft.put("rows.streaming", True, "rows are encoded into a file first, and read from there")
        if workers := config.whole("dataset_num_proc"):
            draft.put("rows.workers", workers)
    if length is not None:
        draft.put(
            "rows.max_length", length, "" if config.has("max_length") or config.has("max_seq_length") else "the default of TRL"
        )
        ends = config.text("truncation_mode") == "keep_end"
        pairs = script in ("dpo", "reward")
        draft.put("rows.too_long", "left" if ends or pairs else "right", "prompts lose their beginning" if pairs else "")
    _learned(config, draft, script)
    test, strategy = config.text("dataset_test_split"), config.data.get("eval_strategy")
    share = config.number("test_split_size")
    files = []
    if share is None and name is not None and strategy not in (None, "no", False):
        files = sources.source(draft, "dataset_test_split", {"path": name, "name": part, "split": test or "test"}, ())
    elif test is not None:
        draft.leave(
            "dataset_test_split", test, "nothing is evaluated there unless `eval_strategy` says so; name it under `rows.validate`"
        )
    sources.validation(draft, "test_split_size", share, files)


def _learned(config: Config, draft: Draft, script: Script) -> None:
    """Which tokens are labels: of conversations, TRL learns all of them unless told otherwise."""
    assistant, completion = config.flag("assistant_only_loss"), config.flag("completion_only_loss")
    if script != "sft":
        return
    if completion is False:
        draft.put("rows.loss_on", "all")
    elif assistant:
        draft.put("rows.loss_on", "assistant")
    else:
        draft.put("rows.loss_on", "assistant", "of whole conversations TRL learns every turn: that is `all` here")


def _precision(config: Config, draft: Draft) -> None:
    dtype = config.text("dtype", "torch_dtype")
    common.precision(config, draft)
    if dtype in ("bfloat16", "bf16") and "train.precision" not in draft.values:
        draft.put("train.precision", "bf16")
    if dtype in ("bfloat16", "bf16"):
        draft.put("train.master_weights", "none", "no fp32 copies, as there; updates are rounded at random so that none is lost")
    elif dtype in ("float16", "fp16"):
        draft.leave("dtype", dtype, "there is no fp16")


def _objective(config: Config, draft: Draft, script: Script, remark: str) -> None:
    given = config.number("beta")
    beta = 0.1 if given is None else given
    losses: list[Any] = []
    if script == "dpo":
        weights = config.take("loss_weights")
        losses = preferences.pair_losses(config, draft, config.names("loss_type") or ["sigmoid"], weights, beta)
    elif script == "kto":
        losses = [preferences.kto(config, beta)]
    elif script == "reward":
        losses = [preferences.reward_model(config)]
    else:
        name = config.text("loss_type")
        if name == "dft":
            draft.put("token_weight", "dft")
        elif name not in (None, "nll", "chunked_nll"):
            draft.leave("loss_type", name)
        if not losses:
            draft.put("objective", "cross_entropy")
    preferences.minimized(config, draft, losses)
    draft.note("objective", remark)
