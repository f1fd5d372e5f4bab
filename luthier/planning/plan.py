"""From a recipe to a run that is ready to start: model, rows, parts, order, cost. Nothing trains here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier import draws, machine
from luthier.errors import Say
from luthier.evaluate.planned import evaluation_sets
from luthier.evaluate.sets import EvalSet, check
from luthier.kinds import Now, Optimizer, RowMap
from luthier.kinds.parts import GROUPS, Parts
from luthier.models.context import context_of
from luthier.models.fingerprint import fingerprint
from luthier.models.load import ModelSource, load_model, load_tokenizer, resolve
from luthier.models.parts import map_parts
from luthier.models.quantized import count, described
from luthier.models.sharding import shard
from luthier.planning.assemble import advised_rate, choose_parts
from luthier.planning.cuts import too_much
from luthier.planning.estimate import Estimate, estimate
from luthier.planning.prepare import check_lengths, check_processes, make_calibration, make_feed, prepare_model
from luthier.recipe import Recipe
from luthier.registry import Part, slots
from luthier.results.control import find_control
from luthier.results.folder import Run
from luthier.rows.annotate import annotations_of
from luthier.rows.encode import EncodedRows
from luthier.rows.gather import encode_rows, mixture_of
from luthier.rows.mixture import described_share
from luthier.rows.shapes import BadRow
from luthier.rows.sources import Joined, read_rows
from luthier.training.build import build_engine
from luthier.training.engine import Engine
from luthier.training.feed import Feed
from luthier.training.inputs import vocabulary_of
from luthier.training.loop import Clock
from luthier.training.precision import pick, pick_device
from luthier.training.schedule import find_schedule, warmup_steps
from luthier.training.services import RunServices
from luthier.training.trial import Measured, measure
from luthier.training.world import World
from luthier.tune import Tune


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
    raw: Iterable[Any]
    """The training rows as read; when streaming they are read again each time."""
    skipped: Sequence[BadRow]
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
    sets: list[EvalSet]
    """What is measured before and after."""
    control: Run | None = None
    """The finished run this one will be compared with."""
    cache: Sequence[str] = ()
    """When streaming, whether each source's encoded rows were in the cache."""
    mapped: Sequence[str] = ()
    """What row maps did."""
    padded: str = ""
    """Why rows run with padding; empty where they are packed."""
    too_large: str = ""
    """What to change, where memory will not do."""

    @property
    def total_numbers(self) -> int:
        """Numbers of the model, tied ones once, without what a technique adds."""
        return count(self.model)

    @property
    def trained_numbers(self) -> int:
        """Numbers that train."""
        return self.engine.tune.numbers()

    def lines(self) -> list[str]:
        """The run in order, one thing a line."""
        recipe, clock = self.recipe, self.clock
        share = 100 * self.trained_numbers / self.total_numbers
        tokens, supervised = self.feed.tokens()
        rates = [clock.learning_rate * clock.factor(s) for s in self._moments()]
        lines = [
            f"model      {self.source.name}: {self.parts.architecture}, {self.total_numbers:,} numbers ({self.source.origin})",
            *(f"holds      {said}" for said in described(self.model, self.dtype)),
            f"rows       {len(self.rows.rows):,} rows, {self.rows.tokens:,} tokens, {self.rows.supervised_tokens:,} of them targets"
            + self._losses(),
            f"           {self._padding()}; longest row {max(self.rows.sizes.tokens):,} tokens",
        ]
        lines += [f"           {said}" for said in (*self.cache, *self.mapped, *map(described_share, self.feed.shares()))]
        lines += [f"{key:<10} {_described(parts)}" for key, parts in self.chosen.items() if parts]
        lines += [
            f"trains     {self.trained_numbers:,} numbers, {share:.2f} % of the model's",
            *self._roles(),
            *(f"           {slot} adds its deltas times {one.scale:g}" for slot, one, _ in self.engine.tune.additives if one.pair),
            *self._optimizers(),
            f"precision  {self.precision}; fp32 copies of trained numbers: {'yes' if recipe.train.masters == 'fp32' else 'no'}",
            f"steps      {clock.steps:,} steps, {tokens:,} tokens, {supervised:,} targets; device {self.device}{self._processes()}",
            f"rate       {clock.learning_rate:g} ({self.rate_from}), {recipe.train.schedule}, warm-up {clock.warmup} steps: "
            + ", ".join(f"{rate:.2g}" for rate in rates)
            + " at 0, 25, 50, 75, 100 %",
            f"evaluates  {', '.join(recipe.evaluate) or 'nothing'}, before and after",
            *([f"compares   with {self.control.folder}"] if self.control is not None else []),
            f"memory     about {self.estimate.total_bytes / 2**20:,.0f} MiB at the peak ({self.estimate.described()})",
            f"time       about {_minutes(self.estimate.seconds)} of training, from the speed of this machine's matrix products",
            *(f"warning    {text}" for text in self.warnings()),
        ]
        return lines

    def warnings(self) -> list[str]:
        """What is allowed but seldom wanted."""
        warnings = [f"{note} ({count} rows)" for note, count in self.rows.notes.items()]
        warnings += [self.too_large] if self.too_large else []
        attention = set(GROUPS["attention"])
        for slot, _, _ in self.engine.tune.additives:
            roles = {one.place.role for one in self.engine.tune.trained.values() if one.slot == slot and one.place is not None}
            if roles <= attention:
                warnings.append(
                    f"`{slot}` stands at attention alone: with the MLP's matrices as well, low-rank deltas learn more like full "
                    "fine-tuning (roles: [linear])"
                )
        return warnings

    def _processes(self) -> str:
        world = self.engine.world
        spread = ", the model spread over them" if self.engine.tune.root is not None else ""
        return f", {world.size} processes{spread}" if world.size > 1 else ""

    def _padding(self) -> str:
        if self.engine.tune.packs:
            return "packed, without padding"
        return f"{100 * self.feed.padding():.1f} % padding: {self.padded}"

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
            "mixture": self.feed.shares(),
            "rows_cache": list(self.cache),
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
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


def make_plan(recipe: Recipe, say: Say = lambda text: None) -> Plan:
    """Load, read, attach and check everything a run needs.

    Args:
        recipe: what to do.
        say: hears what is being done.

    Raises:
        LuthierError: anything in the recipe, the rows or the model that would stop or spoil the run.
    """
    chosen = choose_parts(recipe)
    machine.bound_kernels()
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    sets = evaluation_sets(recipe)
    schedule = find_schedule(recipe.train.schedule)
    control = find_control(recipe)
    world = World.current()
    check_processes(recipe, world)
    sources = read_rows(recipe.rows)
    device = pick_device(recipe.train.device)
    dtype, precision = pick(recipe.train.precision, device)
    # Before the model exists: nothing in it may depend on what ran earlier.
    torch.manual_seed(draws.seed_of(recipe.seed, "model"))
    source = resolve(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, say=say)
    say(f"loading {source.name} ({source.origin})")
    machine.free_what_is_gone()
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=dtype, quantize=recipe.quantize)
    parts = map_parts(model)
    identity = fingerprint(model)
    root = None
    if recipe.train.sharding == "full":
        root = shard(model, parts.block_modules, device, world.size)
    else:
        model.to(device)  # type: ignore[arg-type]
    context = context_of(model.config)
    raw: Iterable[Any] = Joined(sources)
    mapped: list[str] = []
    for slot, part in slots(chosen["maps"]):
        for value in part.values:
            if isinstance(value, RowMap):
                before = list(raw)
                raw = after = value.map(before, RunServices(Tune(model, parts), slot, Now(seed=recipe.seed)))
                mapped += [f"{slot}: {value.told(before, after)}"] if value.told is not None else []
    annotations = annotations_of(value for group in chosen.values() for part in group for value in part.values)
    rows, places, skipped, cache = encode_rows(recipe.rows, sources, raw, tokenizer, context, say, annotations)
    rate, rate_from = advised_rate(recipe, chosen["tune"])
    feed = make_feed(recipe, rows, world, device, mixture_of(recipe.rows, recipe.seed, sources, rows, places))
    steps = feed.total()
    clock = Clock(steps, rate, schedule, warmup_steps(recipe.train.warmup, steps), recipe.seed)
    engine = build_engine(
        model,
        parts,
        tune=chosen["tune"],
        objective=chosen["objective"],
        token_weight=chosen["weight"],
        step=chosen["chain"],
        source=chosen["source"][0],
        keep=chosen["keep"],
        freeze=chosen["freeze"],
        row_maps=chosen["maps"],
        calibration=make_calibration(recipe, rows, tokenizer, context),
        now=clock.at(0, 0.0),
        vocabulary=vocabulary_of(tokenizer, parts.vocabulary),
        masters=recipe.train.masters,
        world=world,
        root=root,
    )
    check_lengths(engine.tune, rows, context)
    clock.restarts = tuple(sorted({share for _, one, _ in engine.tune.freezings for share in one.restarts}))
    check(engine.tune, tokenizer, sets)
    padded = prepare_model(recipe, engine.tune, feed)
    if engine.tune.packs:
        feed.pack()
    cost = estimate(engine, parts, feed, dtype, checkpointing=recipe.train.checkpointing)
    too_large = too_much(recipe, engine, parts, feed, dtype, cost, machine.available_bytes(device))
    return Plan(
        recipe=recipe,
        source=source,
        model=model,
        parts=parts,
        tokenizer=tokenizer,
        sources=[one.name for one in sources],
        rows=rows,
        raw=raw,
        skipped=skipped,
        engine=engine,
        feed=feed,
        clock=clock,
        device=device,
        dtype=dtype,
        precision=precision,
        rate_from=rate_from,
        chosen=chosen,
        estimate=cost,
        fingerprint=identity,
        sets=sets,
        control=control,
        cache=cache,
        mapped=mapped,
        padded=padded,
        too_large=too_large,
    )


def measure_plan(plan: Plan) -> Measured:
    """Take two steps and throw them away: peak memory and time as they are here. The plan cannot be trained afterwards."""
    return measure(plan.engine, plan.feed, plan.clock)
