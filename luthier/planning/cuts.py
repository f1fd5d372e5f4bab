"""What to change in a recipe that will not fit into memory, and what each change saves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from luthier.errors import LuthierError, Say, silent
from luthier.kinds import Now
from luthier.kinds.parts import Parts
from luthier.models.parts import map_parts
from luthier.models.quantized import quantize as quantize_blocks
from luthier.planning.amounts import memory
from luthier.planning.estimate import Estimate, estimate, standing, waiting
from luthier.recipe import Recipe
from luthier.recipe.parts import Chosen, completed
from luthier.registry import KEYS
from luthier.rows.encode import Encoded, EncodedRows, Sizes
from luthier.rows.lazy import LazyRows
from luthier.rows.numbered import without_numbers
from luthier.training.build import build_engine
from luthier.training.engine import Engine
from luthier.training.feed import Feed

SMALLEST = 64
"""Tokens of the smallest micro-batch worth proposing."""


class Cut(NamedTuple):
    """One change of the recipe."""

    change: str
    """As on the command line: `train.gradient_checkpointing=true`."""
    saves: int
    """Bytes at the peak."""


def too_much(
    recipe: Recipe,
    engine: Engine,
    parts: Parts,
    feed: Feed,
    dtype: torch.dtype,
    cost: Estimate,
    available: int | None,
    say: Say = silent,
) -> str:
    """What to change where a run will not fit; empty where it fits, or where the system does not tell.

    Args:
        recipe: what was asked for.
        engine: what is attached.
        parts: the model's map.
        feed: the steps.
        dtype: the type of weights and computation.
        cost: the estimate.
        available: bytes that can still be had beside what stands already.
        say: hears that it does not fit, before what would is looked for.
    """
    if available is None:
        return ""
    # Weights, masters and moments are there already.
    needed = cost.gradients + cost.activations
    if needed <= available:
        return ""
    say("this will not fit into memory as it is: looking for what to change")
    room = cost.total_bytes - needed + available
    return advice(find_cuts(recipe, engine, parts, feed, dtype, cost, room), needed, available)


def find_cuts(recipe: Recipe, engine: Engine, parts: Parts, feed: Feed, dtype: torch.dtype, now: Estimate, room: int) -> list[Cut]:
    """Changes that lower the peak, the one that saves most first. Each is estimated anew.

    Args:
        recipe: what was asked for.
        engine: what is attached.
        parts: the model's map.
        feed: the steps.
        dtype: the type of weights and computation.
        now: the estimate as things are.
        room: bytes that a run may take in all.
    """
    found = [*_smaller_batches(recipe, engine, parts, feed, dtype, now, room)]
    if not recipe.train.gradient_checkpointing:
        found += _checkpointed(engine, parts, feed, dtype, now)
    found += _leaner(recipe, engine, dtype, now)
    return sorted((cut for cut in found if cut.saves > 0), key=lambda cut: -cut.saves)


def advice(cuts: Sequence[Cut], needed: int, available: int) -> str:
    """One warning: what is missing, and what helps."""
    changes = ", ".join(f"{cut.change} (saves {memory(cut.saves)})" for cut in cuts)
    short = f"about {memory(needed)} more are needed at the peak, and {memory(available)} are available"
    return f"{short}; try {changes}" if changes else short


def _smaller_batches(
    recipe: Recipe, engine: Engine, parts: Parts, feed: Feed, dtype: torch.dtype, now: Estimate, room: int
) -> Iterator[Cut]:
    def saved(other: Feed) -> int:
        checkpointing = recipe.train.gradient_checkpointing
        new = estimate(engine, parts, other, dtype, checkpointing=checkpointing, process=now.process)
        return now.total_bytes - new.total_bytes

    longest = max(feed.rows.sizes.lengths)
    limit, best = feed.micro_batch_tokens, 0
    # A row longer than the limit is a micro-batch by itself: below the longest row nothing is won.
    while limit // 2 >= max(longest, SMALLEST) and now.total_bytes - best > room:
        limit //= 2
        best = saved(replace(feed, micro_batch_tokens=limit, _epochs={}, _steps={}))
    yield Cut(f"train.micro_batch_tokens={limit}", best)
    if longest >= 2 * SMALLEST and feed.mixture is None:
        half = longest // 2
        rows = _Shortened(feed.rows.rows, half)
        # Of rows with stored numbers only those of the micro-batches that are counted are read.
        short = EncodedRows((), Sizes.of(_Shortened(without_numbers(feed.rows.rows), half)))
        shorter = replace(feed, rows=replace(short, rows=rows), micro_batch_tokens=min(feed.micro_batch_tokens, half))
        shorter = replace(shorter, _epochs={}, _steps={})
        yield Cut(f"rows.max_length={half} with train.micro_batch_tokens={shorter.micro_batch_tokens}", saved(shorter))


class _Shortened(LazyRows):
    """Rows of which each, and each of its mates, has so many tokens at most."""

    def __init__(self, rows: Sequence[Encoded], tokens: int) -> None:
        self._rows, self._tokens = rows, tokens

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, place: int) -> Encoded:
        """The row at a place."""
        row = self._rows[place]
        mates = tuple(_shortened(one, self._tokens) for one in row.mates)
        return replace(_shortened(row, self._tokens), mates=mates)


def _shortened(row: Encoded, tokens: int) -> Encoded:
    numbers = {name: values[:tokens] for name, values in row.token_columns.items()}
    return replace(row, token_ids=row.token_ids[:tokens], supervised=row.supervised[:tokens], token_columns=numbers)


def _checkpointed(engine: Engine, parts: Parts, feed: Feed, dtype: torch.dtype, now: Estimate) -> Iterator[Cut]:
    model: Any = engine.tune.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    enable, disable = (getattr(model, f"activation_checkpointing_{what}", None) for what in ("enable", "disable"))
    enable, disable = enable or model.gradient_checkpointing_enable, disable or model.gradient_checkpointing_disable
    enable({"use_reentrant": False})
    try:
        new = estimate(engine, parts, feed, dtype, checkpointing=True, process=now.process)
    finally:
        disable()
    yield Cut("train.gradient_checkpointing=true", now.total_bytes - new.total_bytes)


def _leaner(recipe: Recipe, engine: Engine, dtype: torch.dtype, now: Estimate) -> Iterator[Cut]:
    """Fewer trained numbers, or narrower ones: what stands throughout and the gradients, from a model without numbers."""
    stands = now.total_bytes - now.activations - now.process
    changes: list[tuple[str, dict[str, Any], torch.dtype]] = [
        ("tune=half", {"tune": "half"}, dtype),
        ("tune=lora", {"tune": "lora"}, dtype),
    ]
    if recipe.quantize == "none" and recipe.train.sharding == "none":
        if engine.tune.selectives:
            changes.append(("tune=lora with quantize=nf4", {"tune": "lora", "quantize": "nf4"}, dtype))
        else:
            changes.append(("quantize=nf4", {"quantize": "nf4"}, dtype))
    if recipe.train.master_weights == "fp32" and dtype == torch.bfloat16:
        changes.append(("train.master_weights=none", {"master_weights": "none"}, dtype))
    if dtype in (torch.float32, torch.float64):
        changes.append(("train.precision=bf16", {}, torch.bfloat16))
    for change, settings, type_ in changes:
        try:
            new = _standing(recipe, engine, type_, **settings)
        except (LuthierError, RuntimeError, NotImplementedError):
            # This recipe's other parts do not go together with the change, or need real numbers to start.
            continue
        narrower = now.activations * (dtype.itemsize - type_.itemsize) // dtype.itemsize
        yield Cut(change, stands - new + narrower)


def _standing_parts(chosen: Chosen) -> dict[str, object]:
    """The parts that hold something throughout, whatever key they stand under."""
    holding = (
        *KEYS["tune"].kinds.values(),
        *KEYS["optimizer"].kinds.values(),
        *KEYS["objective"].kinds.values(),
        *KEYS["gradient_estimator"].kinds.values(),
    )
    return {
        key: [part for part in parts if any(isinstance(value, holding) for value in part.values)] for key, parts in chosen.items()
    }


def _standing(
    recipe: Recipe, engine: Engine, dtype: torch.dtype, tune: Any = None, masters: str | None = None, quantize: str | None = None
) -> int:
    model: Any = engine.tune.model
    instead = {} if tune is None else {"tune": tune}
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config)).to(dtype)
    parts = map_parts(bare)
    quantize_blocks(bare, parts, quantize or recipe.quantize)
    made = build_engine(
        bare,
        parts,
        completed({**_standing_parts(engine.chosen), **instead}),
        now=Now(seed=recipe.seed),
        vocabulary=engine.inputs.vocabulary,
        masters=masters or recipe.train.master_weights,
        load_others=lambda asked: {name: engine.tune.others[name] for name in asked},
        world=engine.world,
    )
    return sum(standing(made).values()) + waiting(made)
