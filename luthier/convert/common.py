"""What the arguments mean that all three tools hand on to transformers: steps, learning rate, optimizer, precision, checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from luthier.convert.config import Config, mapping
from luthier.convert.draft import Draft

_NEEDLESS = """
do_train overwrite_output_dir plot_loss logging_steps logging_strategy logging_first_step overwrite_cache preprocessing_batch_size
dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataset_prepared_path ddp_timeout
ddp_find_unused_parameters remove_unused_columns pad_to_sequence_len eval_sample_packing model_type tokenizer_type
gradient_checkpointing_kwargs attn_implementation flash_attention flash_attn sdp_attention save_safetensors save_only_model
per_device_eval_batch_size eval_batch_size auto_find_batch_size report_to low_cpu_mem_usage use_fast_tokenizer do_eval
lora_task_type num_processes greater_is_better include_num_input_tokens_seen disable_dropout use_reentrant_gc
"""
NEEDLESS = frozenset(_NEEDLESS.split())
"""Keys that say how the other tool works, not what is trained: what they ask for, luthier does anyway or in a way of its own."""

ALWAYS = frozenset({"shuffle_dataset", "shuffle_merged_datasets", "average_tokens_across_devices"})
"""What luthier does even where a file says `false`."""

ADAMW = frozenset({"adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_anyprecision"})
OF_AN_EPOCH = "counts steps; `luthier plan` says how many an epoch has"
SCHEDULES = ("constant", "linear", "cosine", "warmup_stable_decay")


def new_tokens(draft: Draft, tokens: Sequence[str] | None) -> None:
    """Tokens that are added to the model's."""
    if tokens:
        draft.put(
            "add_tokens", list(dict.fromkeys(tokens)), "their rows train, and begin at the mean of what was read for them before"
        )


def model(config: Config, draft: Draft, name: str, *revision: str) -> None:
    """The model, its revision and whether its code is trusted."""
    draft.put("model", config.text(name) or "MODEL", "" if config.has(name) else f"the file has no `{name}`: name a model")
    found = config.text(*revision)
    if found and found != "main":
        draft.put("revision", found)
    if config.flag("trust_remote_code"):
        draft.put("trust_remote_code", True, "runs code that comes with the model")


def run(config: Config, draft: Draft) -> None:
    """Where the run's folder lies, and its name."""
    folder, name = (config.text("output_dir") or "").rstrip("/").removeprefix("./"), config.text("run_name", "wandb_name")
    above, _, last = ("", "", folder) if folder in ("", ".") else folder.rpartition("/")
    above, last = (folder, name) if name else (above, last)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).lstrip("_.-")
    if name:
        draft.put("name", name, f"the run's folder is {above or 'runs'}/{name}-1, then -2: no run is overwritten")
    if above:
        draft.put("out", above)
    if (seed := config.whole("seed")) is not None:
        draft.put("seed", seed)


def steps(config: Config, draft: Draft, epochs: str, otherwise: float) -> None:
    """How long is trained."""
    passes, number = config.number(epochs), config.whole("max_steps")
    if number is not None and number > 0:
        draft.put("train.steps", number, f"{epochs}, {passes:g}, gives way to it there as well" if passes is not None else "")
    else:
        draft.put("train.epochs", otherwise if passes is None else passes)


def batches(
    config: Config, draft: Draft, rows: str, otherwise: int, devices: int, length: int | None, packed: bool, each: int = 1
) -> None:
    """Rows of a step: those of a device at once, times accumulation, times devices. Where rows are packed into blocks, their tokens.

    Args:
        config, draft: as for every converter.
        rows: the key that holds the rows of a device at once, and `otherwise`, how many those are without it.
        devices: how many there are.
        length: the longest row, in tokens; None: as the model reads.
        packed: whether rows fill blocks of that length.
        each: texts of a row: 2 for pairs.
    """
    at_once, times = config.whole(rows), config.whole("gradient_accumulation_steps")
    of_device = config.whole("batch_size") if times is None else None
    device = at_once or otherwise
    count = (of_device or device * (times or 1)) * devices
    accumulated = max(1, (of_device or device * (times or 1)) // device)
    counted = f"{device} a device x {accumulated} accumulated x " + (
        "1 device (see --devices)" if devices == 1 else f"{devices} devices"
    )
    if packed and length:
        draft.put("train.batch_tokens", count * length, f"full blocks of {length} tokens: {counted}")
    else:
        draft.put("train.batch_rows", count, counted)
    if length:
        texts = f"{device} x 2 texts" if each == 2 else f"{device}"
        draft.put("train.micro_batch_tokens", device * each * length, f"{texts} x {length}, what a device holds at once there")


def learning_rate(config: Config, draft: Draft, otherwise: float | None = None, tool: str = "") -> None:
    """The learning rate; the other tool's default, where the file names none."""
    found = config.number("learning_rate", "lr")
    if found is not None:
        draft.put("train.learning_rate", found)
    elif otherwise is not None:
        draft.put("train.learning_rate", otherwise, f"the default of {tool}")


def schedule(config: Config, draft: Draft, name: str, otherwise: str, warmup: float | None) -> None:
    """How the learning rate goes up and down."""
    found = (config.text(name) or otherwise).lower()
    known = {"constant_with_warmup": "constant"}.get(found, found)
    if known not in SCHEDULES:
        draft.leave(name, found, f"there are {', '.join(SCHEDULES)}; cosine stands in its place")
        known = "cosine"
    ends = "constant, then down to zero in the last fifth" if known == "warmup_stable_decay" else ""
    draft.put("train.schedule", known, ends if config.has(name) or not ends else f"{ends}; the default there")
    steps, share = config.number("warmup_steps"), config.number("warmup_ratio")
    if share is not None and not 0 <= share < 1:
        draft.leave("warmup_ratio", share, "a share of 1 or more is no warm-up")
        share = None
    asked = steps if steps or share is None else share
    if found == "constant":
        draft.put("train.warmup", 0, "`constant` does not warm up there; `constant_with_warmup` does" if asked else "")
    elif asked is not None:
        draft.put("train.warmup", asked)
    elif warmup is not None:
        draft.put("train.warmup", warmup, "none, the default there")


def optimizer(config: Config, draft: Draft, name: str) -> None:
    """The optimizer, its options and clipping; nothing where all are as luthier has them by itself."""
    found = (config.text(name) or "adamw").lower()
    remark = ""
    options: dict[str, Any] = {}
    for theirs, ours, same in (
        ("weight_decay", "weight_decay", 0.0),
        ("adam_beta1", "beta1", 0.9),
        ("adam_beta2", "beta2", 0.999),
        ("adam_epsilon", "epsilon", 1e-8),
        ("adam_eps", "epsilon", 1e-8),
    ):
        value = config.number(theirs)
        if value is not None and value != same:
            options[ours] = value
    if found == "sgd":
        for ours, value in options.items():
            draft.leave("weight_decay" if ours == "weight_decay" else f"adam_{ours}", value, "`sgd` has `momentum` alone")
        options = {}
    elif "adamw" in found and found not in ADAMW:
        remark = f"{found} there: states are in fp32 here, none in 8 bits, 4 bits or paged"
    elif found not in ADAMW:
        draft.leave(name, found, "there are adamw, sgd and sm3; adamw stands in its place, and may want another learning rate")
        remark = f"in place of {found}"
    norm = config.number("max_grad_norm")
    clip: Any = "clip" if norm in (None, 1.0) else {"clip": {"norm": norm}}
    chosen = "sgd" if found == "sgd" else "adamw"
    if options or remark or clip != "clip" or chosen != "adamw":
        draft.put("optimizer", [clip, {chosen: options} if options else chosen], remark)


def precision(config: Config, draft: Draft) -> None:
    """The type of weights and computation."""
    mixed, pure, full = config.take("bf16"), config.flag("pure_bf16", "bfloat16"), config.flag("float32")
    if config.flag("fp16") or config.flag("float16"):
        draft.leave("fp16", True, "there is no fp16; `train.precision: auto` takes bf16 where the hardware has it, else fp32")
    elif pure:
        draft.put("train.precision", "bf16")
        draft.put("train.master_weights", "none", "no fp32 copies, as there; updates are rounded at random so that none is lost")
    elif mixed is True or mixed == "full":
        draft.put("train.precision", "bf16", "weights too, with fp32 copies of what trains; mixed precision there")
    elif mixed is False or full:
        draft.put("train.precision", "fp32")
    elif mixed not in (None, "auto"):
        draft.leave("bf16", mixed, "`train.precision` is auto, bf16, fp32 or fp64")


def checkpoints(config: Config, draft: Draft) -> None:
    """What is saved in the middle of a run."""
    every, strategy = config.number("save_steps"), config.choice("save_strategy")
    if (each := config.number("saves_per_epoch")) is not None and strategy != "no":
        draft.leave("saves_per_epoch", each, f"`train.save_every` {OF_AN_EPOCH}")
    if strategy == "no":
        return
    if every is not None and every >= 1 and strategy in (None, "steps"):
        draft.put("train.save_every", int(every))
    elif every is not None:
        draft.leave("save_steps", every, "a share of the run; `train.save_every` counts steps")
    elif strategy is not None:
        draft.leave("save_strategy", strategy, f"`train.save_every` {OF_AN_EPOCH}")
    if (kept := config.whole("save_total_limit")) is not None and kept > 0:
        draft.put("train.keep_checkpoints", kept)


def evaluations(config: Config, draft: Draft) -> None:
    """When the validation rows are measured in the middle of a run, and whether it keeps the best weights."""
    every, strategy = config.number("eval_steps"), config.choice("eval_strategy", "evaluation_strategy")
    each, patience = config.number("evals_per_epoch"), config.whole("early_stopping_patience")
    best = config.flag("load_best_model_at_end") or patience is not None
    measure = config.text("metric_for_best_model")
    if "rows.validate" not in draft.values:
        for key, value in (("eval_steps", every), ("evals_per_epoch", each), ("early_stopping_patience", patience)):
            if value and strategy != "no":
                draft.leave(key, value, "the file names no rows to evaluate on: see `rows.validate`")
        return
    draft.note("rows.validate", "measured before and after, and ten times in between unless train.evaluate_every says how often")
    if each and strategy != "no":
        draft.leave("evals_per_epoch", each, f"`train.evaluate_every` {OF_AN_EPOCH}")
    if every is not None and every >= 1 and strategy in (None, "steps"):
        draft.put("train.evaluate_every", int(every))
    elif every is not None and strategy != "no":
        draft.leave("eval_steps", every, "`train.evaluate_every` counts steps")
    elif strategy not in (None, "no"):
        draft.leave("eval_strategy", strategy, f"`train.evaluate_every` {OF_AN_EPOCH}")
    if best:
        draft.put("train.best", "validation", "by the loss of the validation rows")
    if best and measure not in (None, "loss", "eval_loss"):
        draft.leave(
            "metric_for_best_model", measure, "the loss of the validation rows chooses; for a metric name a set under `evaluate`"
        )
    if patience is not None:
        draft.put("train.patience", patience)


def devices(config: Config, draft: Draft) -> None:
    """Sharding and compiling."""
    spread = {name: value for name in ("fsdp", "fsdp_config") if (value := config.take(name)) is not None}
    if config.take("fsdp_version") is not None:
        draft.needless.append("fsdp_version")
    for name, value in mapping(spread.get("fsdp_config")).items():
        if "activation_checkpointing" in name and value is True:
            draft.put("train.gradient_checkpointing", True)
        elif "offload" in name and value is True:
            draft.leave(f"fsdp_config.{name}", value, "nothing is offloaded to the processor")
        else:
            draft.needless.append(f"fsdp_config.{name}")
    if "offload" in str(spread.get("fsdp", "")):
        draft.leave("fsdp", spread["fsdp"], "nothing is offloaded to the processor")
    zero = config.take("deepspeed")
    stage = mapping(mapping(zero).get("zero_optimization")).get("stage")
    if zero is not None and (stage == 3 or (isinstance(zero, str) and re.search(r"z(ero)?_?3", zero.lower()))):
        spread["deepspeed"] = zero
    elif zero is not None:
        draft.leave("deepspeed", zero, "each process holds the whole model, and `train.sharding: full` spreads it (ZeRO 3, FSDP2)")
    if spread and draft.values.get("quantize"):
        for name, value in spread.items():
            draft.leave(name, value, "a quantized model is not spread over processes: each holds all of it")
    elif spread:
        said = [f"{name} {value}" if isinstance(value, str) else name for name, value in spread.items()]
        draft.put("train.sharding", "full", f"{' and '.join(said)} there; start with accelerate launch or torchrun")
    if config.flag("torch_compile"):
        draft.put("train.compile", True, "block by block")


def tracking(config: Config, draft: Draft) -> None:
    """Trackers."""
    asked = config.names("report_to") or []
    asked += [name for name in ("wandb", "tensorboard", "trackio") if config.flag(f"use_{name}")]
    asked += [name for name in ("wandb", "trackio") if config.has(f"{name}_project") or config.has(f"{name}_project_name")]
    known = [name for name in dict.fromkeys(asked) if name in ("wandb", "tensorboard", "trackio")]
    other = [name for name in dict.fromkeys(asked) if name not in (*known, "none")]
    if known:
        draft.put("track", known[0] if len(known) == 1 else known)
    for key in ("wandb_project", "wandb_entity", "trackio_project_name"):
        if (value := config.take(key)) is not None:
            variable = "; set WANDB_" + key.rpartition("_")[2].upper() if key.startswith("wandb") else ""
            draft.leave(key, value, f"the project is called `luthier`{variable}")
    if other:
        draft.leave("report_to", other, "there are tensorboard, trackio and wandb")


def finished(config: Config, draft: Draft) -> Draft:
    """What all three tools have alike goes in last: devices, checkpoints, evaluations, trackers, and the keys that nothing asked for."""
    for put in (devices, checkpoints, evaluations, tracking, rest):
        put(config, draft)
    return draft


def rest(config: Config, draft: Draft) -> None:
    """Everything that was not asked for: named, with the reason."""
    for key, value in config.rest().items():
        # What is switched off is off here too, but for what luthier always does.
        if key in NEEDLESS or value is (key in ALWAYS):
            draft.needless.append(key)
        else:
            draft.leave(key, value)
