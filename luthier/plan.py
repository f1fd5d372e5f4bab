"""From a recipe to a run that is ready to start: model, rows, parts, order, cost. Nothing trains here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier import draws, registry
from luthier.errors import LuthierError
from luthier.estimate import Estimate, estimate
from luthier.kinds import OBJECTIVES, STEPS, TUNES, Now, Optimizer
from luthier.models.attention import use_attention
from luthier.models.fingerprint import fingerprint
from luthier.models.load import ModelSource, load_model, load_tokenizer, resolve
from luthier.models.parts import GROUPS, Parts, map_parts
from luthier.recipe import Recipe
from luthier.registry import Part
from luthier.rows.encode import EncodedRows, encode_all
from luthier.rows.read import Rows, read
from luthier.rows.shapes import BadRow
from luthier.training.build import build_engine
from luthier.training.engine import Engine
from luthier.training.feed import Feed
from luthier.training.loop import Clock
from luthier.training.precision import pick, pick_device
from luthier.training.schedule import factor, find_schedule
from luthier.training.services import RunServices
from luthier.training.world import World
from luthier.tune import Tune

Say = Callable[[str], None]
RATE_WITHOUT_ADVICE = 1e-4


@dataclass
class Plan:
    """A run that is ready to start."""

    recipe: Recipe
    source: ModelSource
    model: nn.Module
    parts: Parts
    tokenizer: PreTrainedTokenizerBase
    sources: list[str]
    """Where the training rows come from."""
    rows: EncodedRows
    raw: list[Any]
    """The training rows as read."""
    skipped: list[BadRow]
    engine: Engine
    feed: Feed
    clock: Clock
    device: torch.device
    dtype: torch.dtype
    precision: str
    rate_from: str
    chosen: Mapping[str, list[Part]]
    estimate: Estimate
    fingerprint: str
    """Of the base."""

    @property
    def total_numbers(self) -> int:
        """Numbers of the model, tied ones once, without what a technique adds."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def trained_numbers(self) -> int:
        """Numbers that train."""
        return self.engine.tune.numbers()

    def lines(self) -> list[str]:
        """The run in order, one thing a line."""
        recipe, clock = self.recipe, self.clock
        share = 100 * self.trained_numbers / self.total_numbers
        tokens, supervised = self.feed.tokens()
        rates = [clock.learning_rate * factor(clock.schedule, s, clock.steps, clock.warmup) for s in self._moments()]
        lines = [
            f"model      {self.source.name}: {self.parts.architecture}, {self.total_numbers:,} numbers, from {self.source.origin}",
            f"rows       {len(self.rows.rows):,} rows, {self.rows.tokens:,} tokens, {self.rows.supervised_tokens:,} of them targets"
            + self._losses(),
            f"           {100 * self.feed.padding():.1f} % padding; longest row {max(len(r) for r in self.rows.rows):,} tokens",
        ]
        lines += [f"{key:<10} {_described(parts)}" for key, parts in self.chosen.items() if parts]
        lines += [
            f"trains     {self.trained_numbers:,} numbers, {share:.2f} % of the model's",
            *self._roles(),
            *self._optimizers(),
            f"precision  {self.precision}; fp32 copies of trained numbers: {'yes' if recipe.train.masters == 'fp32' else 'no'}",
            f"steps      {clock.steps:,} steps, {tokens:,} tokens, {supervised:,} targets; device {self.device}",
            f"rate       {clock.learning_rate:g} ({self.rate_from}), {recipe.train.schedule}, warm-up {clock.warmup} steps: "
            + ", ".join(f"{rate:.2g}" for rate in rates)
            + " at 0, 25, 50, 75, 100 %",
            f"evaluates  {', '.join(recipe.evaluate) or 'nothing'}, before and after",
            f"memory     about {self.estimate.total_bytes / 2**20:,.0f} MiB at the peak ({self.estimate.described()})",
            f"time       about {_minutes(self.estimate.seconds)} of training, from the speed of this machine's matrix products",
            *(f"warning    {text}" for text in self.warnings()),
        ]
        return lines

    def warnings(self) -> list[str]:
        """What is allowed but seldom wanted."""
        warnings = []
        attention = set(GROUPS["attention"])
        for slot, _, _ in self.engine.tune.additives:
            roles = {one.place.role for one in self.engine.tune.trained.values() if one.slot == slot and one.place is not None}
            if roles <= attention:
                warnings.append(
                    f"`{slot}` stands at attention alone: with the MLP's matrices as well, low-rank deltas learn more like full "
                    "fine-tuning (roles: [linear])"
                )
        return warnings

    def _moments(self) -> list[int]:
        return [round(share * (self.clock.steps - 1)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]

    def _losses(self) -> str:
        parts = []
        if self.rows.truncated:
            parts.append(f"{self.rows.truncated} truncated")
        if self.rows.dropped:
            parts.append(f"{len(self.rows.dropped)} dropped")
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped")
        return f" ({', '.join(parts)})" if parts else ""

    def _roles(self) -> list[str]:
        counts: dict[str, list[int]] = {}
        for one in self.engine.tune.trained.values():
            role = one.place.role if one.place is not None else one.slot
            count = counts.setdefault(role, [0, 0])
            count[0] += 1
            count[1] += one.numel
        shown = [f"{role} {number:,} in {tensors}" for role, (tensors, number) in counts.items()]
        return ["           " + "; ".join(shown) + " tensors"]

    def _optimizers(self) -> list[str]:
        chain = self.engine.chain
        lines = []
        for i, link in enumerate(chain.links):
            taken = chain.taken(link)
            what = "moves" if isinstance(link.part, Optimizer) else "acts on"
            lines.append(f"step {i + 1}     {link.slot} {what} {len(taken)} of {len(self.engine.tune.trained)} tensors")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The plan for scripts."""
        tokens, supervised = self.feed.tokens()
        return {
            "name": self.recipe.name,
            "model": {"name": self.source.name, "origin": self.source.origin, "architecture": self.parts.architecture},
            "recipe_hash": self.recipe.hash(),
            "trained_numbers": self.trained_numbers,
            "total_numbers": self.total_numbers,
            "trained_share": self.trained_numbers / self.total_numbers,
            "rows": len(self.rows.rows),
            "steps": self.clock.steps,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "learning_rate": self.clock.learning_rate,
            "precision": self.precision,
            "estimated_peak_memory_bytes": self.estimate.total_bytes,
            "estimated_seconds": self.estimate.seconds,
            "warnings": self.warnings(),
            "lines": self.lines(),
        }


def _described(parts: Sequence[Part]) -> str:
    return ", then ".join(
        part.name + (f" ({', '.join(f'{k} {_short(v)}' for k, v in part.options.items())})" if part.options else "")
        for part in parts
    )


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


def choose_parts(recipe: Recipe) -> dict[str, list[Part]]:
    """All techniques a recipe names, looked up and checked, by key."""
    return {
        "maps": registry.make_all(recipe.rows.map, ("row_map",), where="rows.map"),
        "tune": registry.make_all(recipe.tune, TUNES, where="tune"),
        "objective": registry.make_all(recipe.objective, OBJECTIVES, where="objective"),
        "weight": registry.make_all(recipe.token_weight, ("token_weight",), where="token_weight"),
        "chain": registry.make_all(recipe.step, STEPS, where="step"),
        "source": registry.make_all(recipe.source, ("source",), where="source"),
        "keep": registry.make_all(recipe.keep, ("keeper",), where="keep"),
    }


def read_rows(recipe: Recipe) -> tuple[list[Any], list[str], list[BadRow]]:
    """The training rows of all sources, where they come from, and what was skipped.

    Raises:
        LuthierError: a row cannot be read, or two rows of different sources share an id.
    """
    train = recipe.rows.train
    many = train if isinstance(train, list) and train and not isinstance(train[0], Mapping) else [train]
    sources: list[Rows] = [read(one, shape=recipe.rows.shape, on_bad_row=recipe.rows.on_bad_row) for one in many]
    rows = [row for source in sources for row in source]
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            raise LuthierError(
                f"two rows have the id `{row.id}`", where=f"{seen[row.id]} and {row.where}", mend="make the ids differ"
            )
        seen[row.id] = row.where
    return rows, [source.name for source in sources], [bad for source in sources for bad in source.skipped]


def advised_rate(recipe: Recipe, tune: Sequence[Part]) -> tuple[float, str]:
    """The learning rate and where it comes from: the recipe, or the most careful advice among the techniques that train."""
    if recipe.train.learning_rate is not None:
        return recipe.train.learning_rate, "the recipe"
    advice = [(part.card.learning_rate, part.name) for part in tune if part.card.learning_rate is not None]
    if not advice:
        return RATE_WITHOUT_ADVICE, "the default"
    rate, name = min(advice)
    return rate, f"{name}'s default"


def make_plan(recipe: Recipe, say: Say = lambda text: None) -> Plan:
    """Load, read, attach and check everything a run needs.

    Args:
        recipe: what to do.
        say: hears what is being done.

    Raises:
        LuthierError: anything in the recipe, the rows or the model that would stop or spoil the run.
    """
    chosen = choose_parts(recipe)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    if recipe.train.best is not None and recipe.train.best not in recipe.evaluate:
        raise LuthierError(
            f"`best` names `{recipe.train.best}`, which is no evaluation set",
            where="train.best",
            mend="known sets: " + (", ".join(recipe.evaluate) or "none"),
        )
    raw, names, skipped = read_rows(recipe)
    device = pick_device(recipe.train.device)
    dtype, precision = pick(recipe.train.precision, device)
    # Before the model exists: nothing in it may depend on what ran earlier.
    torch.manual_seed(draws.seed_of(recipe.seed, "model"))
    source = resolve(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, say=say)
    say(f"loading {source.name} ({source.origin})")
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=dtype).to(device)  # type: ignore[arg-type]
    parts = map_parts(model)
    identity = fingerprint(model)
    now = Now(seed=recipe.seed)
    for slot, part in ((part.name, part) for part in chosen["maps"]):
        for value in part.values:
            raw = value.map(raw, RunServices(Tune(model, parts), slot, now))
    rows = encode_rows(recipe, raw, tokenizer, parts, model)
    world = World.current()
    rate, rate_from = advised_rate(recipe, chosen["tune"])
    feed = make_feed(recipe, rows, world, device)
    steps = feed.total()
    warmup = recipe.train.warmup
    warm_steps = round(warmup * steps) if warmup < 1 else int(warmup)
    clock = Clock(steps, rate, find_schedule(recipe.train.schedule), min(warm_steps, steps), recipe.seed)
    engine = build_engine(
        model,
        parts,
        tune=chosen["tune"],
        objective=chosen["objective"],
        token_weight=chosen["weight"],
        step=chosen["chain"],
        source=chosen["source"][0],
        keep=chosen["keep"],
        now=clock.at(0, 0.0),
        masters=recipe.train.masters,
        world=world,
    )
    prepare_model(recipe, model, parts)
    cost = estimate(engine, parts, rows.rows, feed, dtype, checkpointing=recipe.train.checkpointing)
    return Plan(
        recipe, source, model, parts, tokenizer, names, rows, raw, skipped, engine, feed, clock, device, dtype, precision,
        rate_from, chosen, cost, identity,
    )  # fmt: skip


def encode_rows(
    recipe: Recipe, raw: Sequence[Any], tokenizer: PreTrainedTokenizerBase, parts: Parts, model: nn.Module
) -> EncodedRows:
    """Training rows as tokens and targets, none longer than the model can read."""
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = recipe.rows.max_tokens
    if limit is not None and context is not None and limit > context:
        raise LuthierError(
            f"rows of {limit} tokens are longer than this model reads ({context})",
            where="rows.max_tokens",
            mend=f"use at most {context}",
        )
    return encode_all(
        raw,
        tokenizer,
        loss_on=recipe.rows.loss_on,
        max_tokens=limit or context,
        too_long=recipe.rows.too_long,
        on_bad_row=recipe.rows.on_bad_row,
    )


def make_feed(recipe: Recipe, rows: EncodedRows, world: World, device: torch.device) -> Feed:
    """The order in which rows are seen."""
    train = recipe.train
    return Feed(
        rows.rows,
        recipe.seed,
        train.micro_batch_tokens,
        epochs=train.epochs,
        steps=train.steps,
        batch_tokens=train.batch_tokens,
        batch_rows=train.batch_rows,
        world=world,
        device=device,
    )


def prepare_model(recipe: Recipe, model: Any, parts: Parts) -> None:
    """Attention, checkpointing and compilation, block by block."""
    if model.config._attn_implementation == "sdpa":
        use_attention(model)
    if recipe.train.checkpointing:
        # transformers renamed it; the non-reentrant form is the only one that reaches every kind of trained tensor.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    if recipe.train.compile:
        for name in parts.block_modules:
            model.get_submodule(name).compile()
