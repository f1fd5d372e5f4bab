"""Bringing a model and its rows into the form in which they run: processes, packing, checkpointing, compilation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from luthier import draws
from luthier.errors import LuthierError, silent
from luthier.kinds import Batch
from luthier.kinds.parts import Reads
from luthier.models.attention import replace_sdpa
from luthier.recipe import RowsRecipe, TrainRecipe
from luthier.rows.batches import collate, plan_epoch
from luthier.rows.chat import form_of
from luthier.rows.columns import fitting
from luthier.rows.encode import EncodedRows
from luthier.rows.gather import encode_rows, splitter_for
from luthier.rows.mixture import Mixture
from luthier.rows.read import Rows, records
from luthier.rows.sources import Joined, read_rows
from luthier.training.feed import Feed
from luthier.training.packing import obstacle
from luthier.training.world import World
from luthier.tune import Tune

SHORT_ROWS = 128
"""Mean tokens of rows below which processors are quicker with rows of like length side by side than with attention row by row: seen at
40 tokens (a quarter quicker), not at 270."""


def check_processes(sharding: str, world: World) -> None:
    """Refuse what the launcher and the recipe ask for differently.

    Raises:
        LuthierError: a model can be spread over several processes only, or the launcher wants FSDP or DeepSpeed on its own account.
    """
    if sharding == "full" and world.size == 1:
        raise LuthierError(
            "there is one process, and a model is spread over several",
            where="train.sharding",
            fix="start with `torchrun --nproc-per-node N -m luthier train RECIPE`, or use sharding: none",
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise LuthierError(
            "DeepSpeed is not used by luthier",
            where="ACCELERATE_USE_DEEPSPEED",
            fix="launch without it; `train.sharding: full` spreads weights, gradients and optimizer state as ZeRO-3 does",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") and sharding != "full":
        raise LuthierError(
            "the launcher asks for FSDP and the recipe does not", where="train.sharding", fix="set train.sharding=full"
        )


def make_feed(
    train: TrainRecipe, seed: int, rows: EncodedRows, world: World, device: torch.device, mixture: Mixture | None
) -> Feed:
    """The order in which rows are seen."""
    return Feed(
        rows,
        seed,
        train.micro_batch_tokens,
        epochs=train.epochs,
        steps=train.steps,
        batch_tokens=train.batch_tokens,
        batch_rows=train.batch_rows,
        world=world,
        device=device,
        mixture=mixture,
    )


def make_calibration(
    recipe: RowsRecipe,
    micro_batch_tokens: int,
    seed: int,
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    reads: Reads,
) -> Callable[[int, str], list[Batch]]:
    """Gives batches for techniques that look at rows before they train: rows of the run, drawn by its seed, or of another source."""

    # Some techniques ask again and again, and a source would be read and tokenized each time.
    @functools.cache
    def calibration(count: int, source: str) -> list[Batch]:
        if not source:
            order = torch.randperm(len(rows.rows), generator=draws.generator(seed, "calibration"))
            chosen = [rows.rows[i] for i in order[:count].tolist()]
        else:
            columns = fitting((record for _, record in records(source)), recipe.columns)
            other = RowsRecipe(
                train=source, columns=columns, loss_on=recipe.loss_on, max_length=recipe.max_length, too_long=recipe.too_long
            )
            sources, splitter = read_rows(other), splitter_for(recipe, form_of(tokenizer), reads)
            if splitter is not None:
                sources = [replace(one, rows=tuple(splitter.rows(one))) for one in sources if isinstance(one, Rows)]
            chosen = list(encode_rows(other, sources, Joined(sources), tokenizer, reads, silent).rows.rows[:count])
        # Of rows that belong together the first teaches, as it does where nothing compares them.
        chosen = [row.group[0] for row in chosen]
        plan = plan_epoch(
            [len(row) for row in chosen],
            micro_batch_tokens=micro_batch_tokens,
            batch_rows=len(chosen),
            seed=seed,
            epoch=0,
        )
        return [collate([chosen[i] for i in group]) for step in plan for group in step]

    return calibration


def check_lengths(tune: Tune, rows: EncodedRows, context: int | None) -> None:
    """Refuse rows that are too long for the model once a prompt stands before them.

    Raises:
        LuthierError: the longest row and the prompt are longer than the model's context.
    """
    longest = max(rows.sizes.lengths)
    if tune.prompt_length and context is not None and longest + tune.prompt_length > context:
        raise LuthierError(
            f"a prompt of {tune.prompt_length} and a row of {longest} tokens are longer than this model reads ({context})",
            where="tune",
            fix=f"shorten the prompt, or set rows.max_length to {context - tune.prompt_length}, if that is enough for a row",
        )


def prepare_model(train: TrainRecipe, tune: Tune, feed: Feed) -> str:
    """Attention, packing, checkpointing and compilation, block by block. Returns why rows are padded, if they are."""
    model: Any = tune.model
    replace_sdpa(model)
    padded = why_padded(train, tune, feed)
    tune.packs = not padded
    if train.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise LuthierError(
                f"{type(model).__name__} cannot recompute its activations",
                where="train.gradient_checkpointing",
                fix="leave it out; smaller micro-batches (train.micro_batch_tokens) save memory as well",
            )
        # transformers renamed it; the non-reentrant form is the only one that reaches every kind of trained tensor.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    if train.compile:
        for name in tune.parts.block_modules:
            model.get_submodule(name).compile()
    return padded


def why_padded(train: TrainRecipe, tune: Tune, feed: Feed) -> str:
    """Why rows run with padding; nothing where they are packed.

    Raises:
        LuthierError: the recipe insists on packing, and it cannot be.
    """
    if train.packing is False:
        return "as the recipe asks"
    mean = feed.rows.tokens / max(1, sum(feed.rows.sizes.members) or len(feed.rows.rows))
    if train.packing == "auto" and feed.device.type == "cpu" and mean < SHORT_ROWS:
        return "rows this short are quicker side by side"
    reason = "blocks would be compiled anew for every micro-batch" if train.compile else obstacle(tune)
    if reason and train.packing is True:
        raise LuthierError(f"rows cannot be packed: {reason}", where="train.packing", fix="use packing: auto or false")
    return reason
