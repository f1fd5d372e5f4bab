"""Loading what a run trains: model, tokenizer, the model's map, on the device where it will run."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier import draws, machine
from luthier.errors import Say
from luthier.kinds.parts import Parts, Reads
from luthier.models.attention import replace_sdpa
from luthier.models.context import reads_of
from luthier.models.faithful import check_forward, own_logits
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_tokenizer
from luthier.models.parts import map_parts
from luthier.models.sharding import Root, shard
from luthier.models.tokens import ids_of
from luthier.recipe import Recipe
from luthier.results.start import Start, load_start, start_of
from luthier.rows.template import choose_for
from luthier.training.precision import pick, pick_device
from luthier.training.world import World


class Loaded(NamedTuple):
    """An untouched model, ready for what will be attached to it."""

    start: Start
    """Where its weights come from."""
    model: nn.Module
    parts: Parts
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Of the base."""
    reads: Reads
    """What it can read."""
    device: torch.device
    dtype: torch.dtype
    precision: str
    root: Root | None
    """Stands above a model that is spread over processes."""


def load(recipe: Recipe, world: World, say: Say, today: date | None = None) -> Loaded:
    """Load the model that a recipe names.

    Args:
        recipe: names it, and how its tokenizer writes conversations.
        world: the processes.
        say: hears what is being done.
        today: what a chat template is told that asks for the day; none: the day it is.

    Raises:
        LuthierError: there is no such model or run, it cannot be mapped, or its tokenizer has no such chat template.
    """
    device = pick_device(recipe.train.device)
    dtype, precision = pick(recipe.train.precision, device)
    # Before the model exists: nothing in it may depend on what ran earlier.
    torch.manual_seed(draws.seed_of(recipe.seed, "model"))
    start = start_of(recipe, say)
    say(f"loading {start.name} ({start.origin})")
    machine.free_what_is_gone()
    tokenizer = load_tokenizer(start.source)
    choose_for(tokenizer, recipe.rows, world.from_first(today or date.today()))
    model = load_start(start, dtype, quantize=recipe.quantize)
    parts = replace(map_parts(model), added=tuple(ids_of(tokenizer, start.own_tokens)))
    identity = fingerprint(model)
    if parts.causal and parts.head:
        expected = own_logits(model, parts.vocabulary)
        replace_sdpa(model)
        check_forward(model, parts, expected)
    root = None
    if recipe.train.sharding == "full":
        root = shard(model, parts.block_modules, device, world.size)
    else:
        model.to(device)  # type: ignore[arg-type]
    reads = reads_of(model.config)._replace(conversations=parts.causal)
    return Loaded(start, model, parts, tokenizer, identity, reads, device, dtype, precision, root)
