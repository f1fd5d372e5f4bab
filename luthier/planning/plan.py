"""From a recipe to a run that is ready to start: model, rows, parts, order, cost. Nothing trains here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier import machine
from luthier.errors import Say, silent
from luthier.evaluate.overlap import overlaps, warnings_about
from luthier.evaluate.planned import evaluation_sets
from luthier.evaluate.sets import EvalSet, check
from luthier.kinds import Head, Optimizer, Prefix, Prompt, RepresentationEdit
from luthier.kinds.parts import GROUPS, Parts
from luthier.models.experts import mixture_of
from luthier.models.modes import drops
from luthier.models.quantized import count, described
from luthier.planning import amounts, experts, new_tokens
from luthier.planning.attach import attach
from luthier.planning.cuts import too_much
from luthier.planning.estimate import Estimate, estimate
from luthier.planning.held_out import LOOKS, held_out_set
from luthier.planning.language import unknown_language
from luthier.planning.load import load
from luthier.planning.models import OtherModels
from luthier.planning.numbers import Numbered
from luthier.planning.prepare import check_processes
from luthier.planning.read import check_maps, read
from luthier.recipe import Recipe
from luthier.recipe.parts import Chosen, choose_parts
from luthier.registry import KINDS, Part, names, slots_of, values_of
from luthier.results.control import find_control
from luthier.results.folder import Run
from luthier.results.start import Start
from luthier.rows.encode import EncodedRows, told
from luthier.rows.files import LeftOut
from luthier.rows.mixture import described_share
from luthier.rows.shapes import BadRow
from luthier.rows.sources import read_rows
from luthier.rows.template import date_of
from luthier.rows.thinking import described as described_thinking
from luthier.training.build import check_predicts
from luthier.training.engine import Engine
from luthier.training.feed import Feed
from luthier.training.loop import Clock
from luthier.training.schedule import find_schedule
from luthier.training.trial import Measured, measure
from luthier.training.world import World
from luthier.tune.merge import lacking_bias

LABEL = 13
"""How wide the words are that each line of a plan begins with."""
SHORT = {"gradient_estimator": "gradients"}
"""Keys of a recipe that are wider than that, and what stands for them."""
SHOWN = 8
"""Files that a plan names one by one."""
NOTHING_BEFORE = " " * (LABEL + 1)
"""Stands before a line of the plan that goes on with what the line above is about."""


@dataclass
class Plan:
    """A run that is ready to start."""

    recipe: Recipe
    start: Start
    """Where the model's weights come from."""
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
    chosen: Chosen
    estimate: Estimate
    fingerprint: str
    """Of the base."""
    sets: list[EvalSet]
    """What is measured before and after."""
    numbered: Numbered
    """What models gave to the rows beforehand."""
    others: OtherModels | None = None
    """The other models that techniques asked for."""
    control: Run | None = None
    """The finished run this one will be compared with."""
    cache: Sequence[str] = ()
    """When streaming, whether each source's encoded rows were in the cache."""
    mapped: Sequence[str] = ()
    """What was made of the rows that were read, by the recipe and by row maps."""
    files: Sequence[str] = ()
    """What the training rows are read from."""
    left_out: Sequence[LeftOut] = ()
    """What stands beside these files and was not read."""
    padded: str = ""
    """Why rows run with padding; empty where they are packed."""
    noted: Sequence[str] = ()
    """What deserves a warning in the rows that are measured."""
    overlap: Mapping[str, int] = field(default_factory=dict)
    """By evaluation set, how many of its rows also stand in the training rows."""
    too_large: str = ""
    """What to change, where memory will not do."""

    @property
    def total_parameters(self) -> int:
        """Parameters of the model, tied ones once, without what a technique adds."""
        return count(self.model)

    @property
    def active_parameters(self) -> int:
        """Those of them that a token passes through: all, but for a mixture's experts to which it is not sent."""
        mixture = mixture_of(self.model, self.parts)
        return self.total_parameters if mixture is None else mixture.active

    @property
    def trained_parameters(self) -> int:
        """Parameters that train."""
        return self.engine.tune.numbers()

    def lines(self) -> list[str]:
        """The run in order, one thing a line."""
        recipe, clock = self.recipe, self.clock
        share = 100 * self.trained_parameters / self.total_parameters
        tokens, supervised = self.feed.tokens()
        rates = [clock.learning_rate * clock.factor(s) for s in self._moments()]
        lines = [
            f"model         {self.start.name}: {self.parts.architecture}, {self.total_parameters:,} parameters ({self.start.origin})",
            *(f"{NOTHING_BEFORE}{said}" for said in experts.active(self.model, self.parts)),
            *(f"holds         {said}" for said in described(self.model, self.dtype)),
            *_listed("tokens", new_tokens.described(self.start, self.parts, self.engine.tune)),
            *_listed("models", [] if self.others is None else self.others.told),
            f"rows          {self._rows()}, {self.rows.tokens:,} tokens, {self.rows.supervised_tokens:,} of them labels"
            + self._losses(),
            f"{NOTHING_BEFORE}{self._padding()}; longest row {max(self.rows.sizes.lengths):,} tokens",
        ]
        lines += [f"{NOTHING_BEFORE}{said}" for said in (*self.cache, *self.mapped, *map(described_share, self.feed.shares()))]
        lines += _listed("stored", self.numbered.said)
        lines += _listed("chat template", self._template())
        lines += _listed("reasoning", described_thinking(self.raw, self.recipe.rows.thinking))
        lines += _listed("files", list(self.files))
        lines += _listed("left out", [f"{one.file}: {one.why}" for one in self.left_out])
        lines += [f"{SHORT.get(key, key):<{LABEL}} {_described(parts)}" for key, parts in self.chosen.items() if parts]
        lines += [
            f"trains        {self.trained_parameters:,} parameters, {share:.2f} % of the model's",
            *self._roles(),
            *_listed("map", self.parts.unknown()),
            *(f"{NOTHING_BEFORE}{said}" for said in experts.trained(self.engine.tune)),
            *(
                f"{NOTHING_BEFORE}{slot} adds its deltas times {one.scale:g}"
                for slot, one, _ in self.engine.tune.weight_deltas
                if one.pair
            ),
            *self._optimizers(),
            f"precision     {self.precision}; fp32 master weights: {'yes' if recipe.train.master_weights == 'fp32' else 'no'}",
            f"steps         {clock.steps:,} steps, {tokens:,} tokens, {supervised:,} labels; device {self.device}{self._processes()}",
            f"learning rate {clock.learning_rate:g} ({self.rate_from}), {recipe.train.schedule}, warm-up {clock.warmup} steps: "
            + ", ".join(f"{rate:.2g}" for rate in rates)
            + " at 0, 25, 50, 75, 100 %",
            f"evaluates     {', '.join(one.name for one in self.sets) or 'nothing'}, before and after{self._between()}",
            *_listed("benchmarks", [one.chosen.task.described for one in self.sets if one.chosen.task is not None]),
            *(f"sends         {one.chosen.scoring.sends} ({one.name})" for one in self.sets if one.chosen.scoring.sends),
            *([f"baseline run  {self.control.folder}"] if self.control is not None else []),
            f"memory        about {amounts.memory(self.estimate.total_bytes)} at the peak ({self.estimate.described()})",
            f"time          about {amounts.time(self.estimate.seconds)} of training, from the speed of this machine's matrix products",
            *(f"warning       {text}" for text in (*self.warnings(), *warnings_about(self.overlap))),
        ]
        return lines

    def warnings(self) -> list[str]:
        """What is allowed but seldom wanted."""
        warnings = [*told(self.rows.notes, self.rows.first_noted), *self.noted]
        warnings += [self.too_large] if self.too_large else []
        warnings += self._chosen_by_what_is_reported()
        warnings += self._given_in_python()
        warnings += [
            f"no technique asks for the model `{name}`: it was not loaded" for name in (self.others.unused() if self.others else [])
        ]
        if self.engine.world.size > 1 and drops(self.model):
            warnings.append(
                "the model's own dropout is drawn by every process for itself: another number of processes gives other weights "
                "(dropout of techniques does not)"
            )
        warnings += [
            f"`{slot}` learns shifts that fold into biases, and this model lacks some: the result stays beside the weights, and cannot be "
            "exported as a plain model"
            for slot in lacking_bias(self.engine.tune)
        ]
        attention = set(GROUPS["attention"])
        for slot, _, _ in self.engine.tune.weight_deltas:
            roles = {one.place.role for one in self.engine.tune.trained.values() if one.slot == slot and one.place is not None}
            if roles <= attention:
                warnings.append(
                    f"`{slot}` stands at attention alone: with the MLP's matrices as well, low-rank deltas learn more like full "
                    "fine-tuning (target_modules: [linear])"
                )
        return warnings

    def _chosen_by_what_is_reported(self) -> list[str]:
        best = self.recipe.train.best
        if best is None:
            return []
        why = "its values after training are the best of several looks, so a little too good; report another set"
        return [f"`train.best` chooses the weights by {best}, which is reported as well: {why}"]

    def _given_in_python(self) -> list[str]:
        """What a run's folder cannot hold: values that no technique's name and options make again."""
        kinds = (RepresentationEdit, Prefix, Prompt)
        lost = [slot for slot, value in values_of(self.chosen, *kinds) if _by_hand(self.chosen, slot)]
        return [
            f"`{slot}` was given in Python: the result can be used in this process, and neither opened again nor exported; write it as "
            "a technique in a file of your own (LUTHIER_METHODS) for that"
            for slot in dict.fromkeys(lost)
        ]

    def _processes(self) -> str:
        world = self.engine.world
        spread = ", the model spread over them" if self.engine.tune.root is not None else ""
        return f", {world.size} processes{spread}" if world.size > 1 else ""

    def _rows(self) -> str:
        rows, members = len(self.rows.rows), self.rows.sizes.members
        if not members:
            return f"{rows:,} rows"
        return f"{rows:,} pairs" if set(members) == {2} else f"{rows:,} groups of {sum(members):,} rows"

    def _padding(self) -> str:
        if self.engine.tune.packs:
            return "packed, without padding" + self._beginnings()
        return f"{100 * self.feed.padding():.1f} % padding: {self.padded}"

    def _beginnings(self) -> str:
        sizes = self.rows.sizes
        once = sum(sizes.tokens) - sum(self.feed.run(sizes)) if self.feed.packed else 0
        return f"; {once:,} tokens that rows of a group begin with alike are not run again" if once else ""

    @property
    def between(self) -> tuple[int | None, list[EvalSet]]:
        """After how many steps sets are measured during training, and which: held-out rows also where the recipe does not say when."""
        every = self.recipe.train.evaluate_every
        if every is not None or self.recipe.rows.validate is None:
            return every, self.sets
        return -(-self.clock.steps // LOOKS), self.sets[:1]

    def _between(self) -> str:
        every, sets = self.between
        names = ", ".join(one.name for one in sets)
        return f"; {names} every {'step' if every == 1 else f'{every:,} steps'}" if every is not None and sets else ""

    def _template(self) -> list[str]:
        name, day = self.recipe.rows.chat_template, date_of(self.tokenizer)
        told = [f"`{name}`"] if name is not None else []
        told += [f"told that it is {day}"] if day is not None else []
        return ["; ".join(told)] if told else []

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
        return [NOTHING_BEFORE + "; ".join(shown) + " tensors"]

    def _optimizers(self) -> list[str]:
        chain = self.engine.chain
        lines = []
        for link in chain.links:
            taken = chain.taken(link)
            moves = isinstance(link.part, Optimizer)
            label, what = ("optimizer", "moves") if moves else ("transform", "acts on")
            lines.append(f"{label:<{LABEL}} {link.slot} {what} {len(taken)} of {len(self.engine.tune.trained)} tensors")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The plan for scripts."""
        tokens, supervised = self.feed.tokens()
        return {
            "name": self.recipe.name,
            "model": {"name": self.start.name, "origin": self.start.origin, "architecture": self.parts.architecture},
            "recipe_hash": self.recipe.hash(),
            "trained_parameters": self.trained_parameters,
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "trained_share": self.trained_parameters / self.total_parameters,
            "rows": len(self.rows.rows),
            "steps": self.clock.steps,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "learning_rate": self.clock.learning_rate,
            "precision": self.precision,
            "estimated_peak_memory_bytes": self.estimate.total_bytes,
            "mixture": self.feed.shares(),
            "rows_cache": list(self.cache),
            "stored": list(self.numbered.said),
            "files": list(self.files),
            "left_out": [one._asdict() for one in self.left_out],
            "estimated_seconds": self.estimate.seconds,
            "warnings": [*self.warnings(), *warnings_about(self.overlap)],
            "lines": self.lines(),
        }


def _by_hand(chosen: Chosen, slot: str) -> bool:
    """Whether what bears this slot is no technique that can be looked up."""
    part = next(part for _, named, part in slots_of(chosen) if named == slot)
    return part.kind not in KINDS or part.name not in names(part.kind)


def _listed(label: str, said: Sequence[str]) -> list[str]:
    """Lines of a plan under one label."""
    shown = [*said[:SHOWN], *([f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else [])]
    return [f"{label if not place else '':<{LABEL}} {text}" for place, text in enumerate(shown)]


def _described(parts: Sequence[Part]) -> str:
    return ", then ".join(_described_part(part) for part in parts)


def _described_part(part: Part) -> str:
    """A technique with its options, but for those that ask for nothing: no blocks named are all blocks."""
    options = [f"{key} {_short(value)}" for key, value in part.options.items() if value is not None and value not in ((), "")]
    return f"{part.name} ({', '.join(options)})" if options else part.name


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_plan(recipe: Recipe, say: Say = silent, *, today: date | None = None) -> Plan:
    """Load, read, attach and check everything a run needs.

    Args:
        recipe: what to do.
        say: hears what is being done.
        today: what a chat template is told that asks for the day; none: the day it is.

    Raises:
        LuthierError: anything in the recipe, the rows or the model that would stop or spoil the run.
    """
    chosen = choose_parts(recipe)
    check_maps(recipe.rows, chosen)
    machine.bound_kernels()
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    head = next((value for _, value in values_of(chosen) if isinstance(value, Head)), None)
    validated = recipe.rows.validate is not None
    sets = evaluation_sets(recipe.evaluate, recipe.train, head, recipe.rows.columns, validated=validated)
    schedule = find_schedule(recipe.train.schedule)
    control = find_control(recipe.baseline_run, recipe.out)
    world = World.current()
    check_processes(recipe.train.sharding, world)
    sources = read_rows(recipe.rows)
    loaded = load(recipe, world, say, today)
    check_predicts(values_of(chosen), loaded.parts)
    rows = read(recipe.rows, recipe.seed, sources, chosen, loaded, say)
    others = OtherModels(recipe.models, recipe.out, loaded, say)
    sets = [*([held_out_set(rows.held, recipe.rows, loaded.reads, head)] if rows.held is not None else []), *sets]
    engine, feed, clock, rate_from, padded = attach(recipe, schedule, chosen, loaded, rows, others, world)
    noted = [
        *check(engine.tune, loaded.tokenizer, sets, rows.encoded.notes),
        *unknown_language(loaded.start.source.name, loaded.tokenizer, rows.raw),
    ]
    say("estimating memory and time")
    cost = estimate(engine, loaded.parts, feed, loaded.dtype, checkpointing=recipe.train.gradient_checkpointing)
    room = machine.available_bytes(loaded.device)
    return Plan(
        recipe=recipe,
        start=loaded.start,
        model=loaded.model,
        parts=loaded.parts,
        tokenizer=loaded.tokenizer,
        sources=rows.sources,
        rows=rows.encoded,
        raw=rows.raw,
        skipped=rows.skipped,
        engine=engine,
        feed=feed,
        clock=clock,
        device=loaded.device,
        dtype=loaded.dtype,
        precision=loaded.precision,
        rate_from=rate_from,
        chosen=chosen,
        estimate=cost,
        fingerprint=loaded.fingerprint,
        sets=sets,
        control=control,
        others=others,
        cache=rows.cache,
        mapped=rows.mapped,
        numbered=rows.numbered,
        files=rows.files,
        left_out=rows.left_out,
        padded=padded,
        noted=noted,
        overlap={name: len(found) for name, found in overlaps(rows.raw, {one.name: one.rows for one in sets}).items()},
        too_large=too_much(recipe, engine, loaded.parts, feed, loaded.dtype, cost, room, say),
    )


def measure_plan(plan: Plan) -> Measured:
    """Take two steps and throw them away: peak memory and time as they are here. The plan cannot be trained afterwards."""
    return measure(plan.engine, plan.feed, plan.clock)
