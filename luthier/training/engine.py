"""One optimizer step, in the order in which it happens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier import draws
from luthier.errors import LuthierError
from luthier.kinds import Batch, Callback, GradientEstimator, Now, Services, State, TrainedLike, View
from luthier.models.modes import drops, evaluating
from luthier.models.sharding import is_sharded
from luthier.registry import Part
from luthier.training import agreement
from luthier.training.chain import Chain
from luthier.training.inputs import Inputs
from luthier.training.objective import Counted, Looked, Noted, Objective, Sums
from luthier.training.services import Calibration, RunServices, shares_beginnings
from luthier.training.world import World
from luthier.tune import Trained, Tune


class Weights(NamedTuple):
    """What token weights leave of a step."""

    weighted_share: float
    """Of the labels, those whose weight is not 0."""
    effective_labels: float
    """The number of equally weighted labels that would have as much to say: (sum of weights)^2 / sum of their squares."""
    entropy: float
    """Mean entropy of the model's distributions at the labels that were run, in nats."""


class StepResult(NamedTuple):
    """What one step reports. Losses are in nats."""

    loss: float
    """What was minimized: all terms, each divided by its units."""
    nll: float
    """Plain cross-entropy, a mean over the step's labels, without rows that a rule left out; of rows that belong together, such as two
    answers, those of the first alone."""
    parts: dict[str, float]
    tokens: int
    supervised: int
    """All labels, of all rows that belong together."""
    rows: int
    kept: float
    """Mean token weight: 1 where every label counts fully."""
    weights: Weights | None = None
    """Of a weighted loss: what the weights leave."""
    notes: Mapping[str, float] = {}
    """What techniques log."""
    said: tuple[str, ...] = ()
    skipped: bool = False


@dataclass
class Kept:
    """One callback under its slot."""

    slot: str
    callback: Callback
    state: State


@dataclass
class Engine:
    """Everything a step needs."""

    tune: Tune
    objective: Objective
    inputs: Inputs
    chain: Chain
    source: GradientEstimator
    callbacks: list[Kept] = field(default_factory=list)
    world: World = field(default_factory=World)
    states: dict[str, State] = field(default_factory=dict)
    """What every technique remembers, by slot."""
    calibration: Calibration | None = None
    best_states: dict[str, State] = field(default_factory=dict)
    """What callbacks that act when a stage ends remembered when the numbers were best, by slot."""
    chosen: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    """The run's parts by the recipe's key; owners of kinds that no step needs take their values from here."""
    committed: bool = False
    """The step in progress has begun to change numbers: a failure from here on cannot be taken back."""

    def rest(self) -> None:
        """Training is over: optimizer state, gradients and earlier states of what trained are let go; no step can follow."""
        self.tune.rest()
        self.chain.rest()

    def keep_best(self) -> None:
        """Remember the trained numbers as they are now, and what callbacks know that will act on them when the stage ends."""
        self.tune.snapshot("best")
        self.best_states = {one.slot: copy.deepcopy(one.state) for one in self.callbacks if one.callback.after_stage is not None}

    def go_back_to_best(self) -> None:
        """Make what was remembered the run's own again; nothing happens where nothing was."""
        if "best" not in self.tune.snapshots:
            return
        self.tune.go_back("best")
        for slot, state in self.best_states.items():
            # In place: the parts of a technique share their state.
            self.states[slot].clear()
            self.states[slot].update(copy.deepcopy(state))

    @property
    def shares_beginnings(self) -> bool:
        """Whether packed rows of a group always run what they begin with once: nothing tells them apart there in any step."""
        alike = shares_beginnings(self.tune, self.objective.columns(), self.objective.others(), trains=True)
        return alike and not self.inputs.maps and not drops(self.tune.model)

    def services(self, slot: str, now: Now) -> Services:
        """What a technique under this slot may ask."""
        return RunServices(self.tune, slot, now, self.calibration)

    def step(self, batches: Sequence[Batch], now: Now) -> StepResult:
        """Take one optimizer step over the micro-batches of this process.

        Raises:
            LuthierError: the loss or a gradient is not finite; the rows are named and nothing was changed.
        """
        self.committed = False
        # Models cannot run on no rows; they would add zero.
        batches = [with_context(batch, self.tune.prompt_labels) for batch in batches if batch.row_ids]
        # Dropout and other draws of the model depend on the step alone, so that resuming needs no saved state.
        torch.manual_seed(draws.seed_of(now.seed, "step", now.step, self.world.rank))
        looked = self._look(batches, now)
        given, keeps = batches, None
        if looked is not None:
            batches, keeps = looked.batches, looked.keeps
        idle = self._idle_passes(len(batches))
        passes = [*batches, *idle]
        units = self.objective.units(batches, keeps, self.world)
        counts = self.world.sum_numbers(
            [
                float(sum(b.tokens for b in given)),
                float(sum(b.supervised for b in given)),
                float(sum(len(b.row_ids) for b in given)),
                float(sum(b.of_first().supervised for b in given)),
            ]
        )
        if self.objective.idle(units):
            # Nothing moves, but the clock does: what was to change with this step changes.
            self.committed = True
            self._keep(now, [kept for kept in self.callbacks if kept.callback.by_clock])
            said = self._refresh(now)
            return StepResult(0.0, 0.0, {}, int(counts[0]), 0, int(counts[2]), 0.0, said=tuple(said), skipped=True)
        # Not before: what comes to stand still may lose its optimizer state, and a step that is not taken changes nothing.
        self.tune.freeze(now)
        agreement.check(self.world, self.tune, values=False)
        self.tune.start_observing(now)
        work = Work(self, passes, now, units, keeps, idle=len(idle))
        work.gather()
        self.source.gradients(work)
        self._refuse_together(work.broken)
        self._sum_gradients(batches)
        self._refuse_untouched(work)
        if not passes:
            self.tune.observe_nothing()
        self.committed = True
        if "all" in self.source.gives:
            self.chain.observed = frozenset(self.tune.observed())
            self.chain.step(now)
            self.tune.observe(self.world.sum, self.chain.received, self.chain.factor)
        said = self._afterwards(now)
        loss, *counted = self.world.sum_numbers([work.total, *work.counted])
        told = Counted(*counted)
        targets, run = max(counts[3], 1.0), max(told.targets, 1.0)
        notes = {} if looked is None else looked.notes
        return StepResult(
            loss,
            told.nll / run,
            self._together(work.parts),
            int(counts[0]),
            int(counts[1]),
            int(counts[2]),
            told.weight / targets,
            self._weights(told, targets),
            {**self._kept_notes(), **notes, **self._noted(work.notes)},
            tuple(said),
        )

    def _look(self, batches: list[Batch], now: Now) -> Looked | None:
        """What rules over the whole step keep. Where passes gather a model that is spread, all processes make equally many."""
        if not self.objective.rules:
            return None
        passes = [*batches, *self._idle_passes(len(batches))]
        return self.objective.look(self.tune, passes, now, self.world, lambda slot: self.services(slot, now))

    def _weights(self, told: Counted, targets: float) -> Weights | None:
        if not self.objective.is_weighted:
            return None
        effective = told.weight**2 / told.squares if told.squares else 0.0
        return Weights(told.kept / targets, effective, told.entropy / max(told.targets, 1.0))

    def _kept_notes(self) -> dict[str, float]:
        return {
            name: float(number)
            for kept in self.callbacks
            if kept.callback.notes is not None
            for name, number in kept.callback.notes(kept.state).items()
        }

    def _noted(self, own: Mapping[str, Noted]) -> dict[str, float]:
        """Means of what techniques log, over all processes."""
        everyone = self.world.gather_plain({name: tuple(one) for name, one in own.items()})
        names = dict.fromkeys(name for one in everyone for name in one)
        return {name: reduce(Noted.plus, (Noted(*one[name]) for one in everyone if name in one)).mean for name in names}

    def _together(self, own: dict[str, float]) -> dict[str, float]:
        """Numbers by name, added up over the processes, which may have different names."""
        everyone = self.world.gather_plain(own)
        return {name: sum(parts.get(name, 0.0) for parts in everyone) for parts in everyone for name in parts}

    def _idle_passes(self, own: int) -> list[Batch]:
        """Passes that add nothing: where a pass gathers a model that is spread, all processes must make equally many."""
        if self.tune.root is None:
            return []
        device = next(self.tune.model.parameters()).device
        return [idle_batch().to(device) for _ in range(self.world.max(own) - own)]

    def _refuse_together(self, broken: Sequence[Batch]) -> None:
        """Stop in all processes when the loss was not finite in one: a lone error would leave the others waiting."""
        if self.world.any(bool(broken)):
            self.tune.free_gradients()
            raise not_finite("the loss", self._everyones(broken))

    def _everyones(self, batches: Sequence[Batch]) -> list[str]:
        everyone = self.world.gather_plain([row for batch in batches for row in batch.row_ids])
        return [row for rows in everyone for row in rows]

    def _sum_gradients(self, batches: Sequence[Batch]) -> None:
        everything = list(self.tune.trained.values())
        # A source that does not go through backward has set what is the same on every process.
        several = self.source.gives >= {"all", "gradients"}
        # What no process touched takes no step, as in a run of one process.
        touched = self.world.sum_numbers([float(one.gradient is not None) for one in everything]) if several else []
        for trained, processes in zip(everything, touched, strict=False):
            if processes:
                if trained.gradient is None:
                    wide = torch.promote_types(trained.master.dtype, torch.float32)
                    trained.gradient = torch.zeros_like(trained.master, dtype=wide)
                if not is_sharded(trained.gradient):
                    self.world.sum(trained.gradient)
        # Summed over the processes, the gradient tells all of them the same.
        name = first_not_finite(everything)
        if name is not None:
            self.tune.free_gradients()
            raise not_finite(f"the gradient of {name}", self._everyones(batches))

    def _refuse_untouched(self, work: Work) -> None:
        """Stop where the loss does not depend on anything that trains: every step would be like this one, and change nothing."""
        if "all" in self.source.gives and work.trained and not any(one.gradient is not None for one in work.trained):
            raise LuthierError(
                "the loss depends on nothing that trains: no gradient reached any of it",
                where="objective",
                fix="use an objective that is differentiable, or a source that needs no gradient",
            )

    def _afterwards(self, now: Now) -> list[str]:
        watched = {name: one for name, one in self.chain.received.items() if name in self.chain.watching}
        for name, gradient in watched.items():
            self.tune.trained[name].gradient = gradient
        self._keep(now, self.callbacks)
        for name in watched:
            self.tune.trained[name].gradient = None
        self.chain.received.clear()
        self.chain.came.clear()
        return self._refresh(now)

    def _keep(self, now: Now, callbacks: Sequence[Kept]) -> None:
        for kept in callbacks:
            if kept.callback.after_step is not None and self.tune.turns.moves(kept.slot, now):
                kept.callback.after_step(kept.state, self.services(kept.slot, now))

    def _refresh(self, now: Now) -> list[str]:
        said = self.tune.refresh(lambda slot: self.services(slot, now), now)
        if said:
            agreement.check(self.world, self.tune, values=True)
        return said


def with_context(batch: Batch, label_P: Tensor | None) -> Batch:
    """A batch whose rows begin with the virtual tokens of a prompt that are learned themselves."""
    if label_P is None:
        return batch
    rows, length = len(batch.row_ids), len(label_P)
    before = torch.arange(length, device=batch.token_ids_BT.device).expand(rows, -1)
    label_BP = label_P.to(batch.label_BT).expand(rows, -1)
    return batch._replace(
        token_ids_BT=torch.cat([-1 - before, batch.token_ids_BT], dim=1),
        attend_BT=torch.cat([torch.ones_like(before, dtype=torch.bool), batch.attend_BT], dim=1),
        position_BT=torch.cat([before, batch.position_BT + length], dim=1),
        label_BT=torch.cat([label_BP, batch.label_BT], dim=1),
        token_columns={
            name: torch.cat([column.new_zeros(rows, length, *column.shape[2:]), column], dim=1)
            for name, column in batch.token_columns.items()
        },
    )


def idle_batch() -> Batch:
    """Two tokens without a label."""
    ids_BT = torch.zeros(1, 2, dtype=torch.long)
    return Batch(ids_BT, ids_BT == 0, torch.arange(2)[None], ids_BT - 100, ("",))


def first_not_finite(trained: Sequence[Trained]) -> str | None:
    """The first tensor whose gradient overflowed. Norms tell it in one pass over the numbers."""
    named = [(one.name, one.gradient) for one in trained if one.gradient is not None]
    norms = torch.tensor([float(gradient.norm()) for _, gradient in named])
    return None if bool(norms.isfinite().all()) else named[int((~norms.isfinite()).nonzero()[0])][0]


def not_finite(what: str, rows: Sequence[str]) -> LuthierError:
    """The error for numbers that overflowed; it names the rows."""
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return LuthierError(
        f"{what} is not a finite number; training stopped before the step, and nothing was saved from it",
        where=f"rows {shown}",
        fix="look at these rows, lower the learning rate, or use precision: fp32",
    )


class Work:
    """One step's work as a source of gradients sees it."""

    def __init__(
        self,
        engine: Engine,
        batches: Sequence[Batch],
        now: Now,
        units: Sequence[tuple[float, ...]],
        keeps: list[torch.Tensor] | None,
        idle: int = 0,
    ) -> None:
        self._engine, self.batches, self.now, self._units = engine, batches, now, units
        self._keeps, self._real = keeps, len(batches) - idle
        self.broken: list[Batch] = []
        """Micro-batches of this process whose loss was not finite."""
        self.total = 0.0
        self.counted = Counted()
        self.parts: dict[str, float] = {}
        self.notes: dict[str, Noted] = {}

    @property
    def trained(self) -> Sequence[Trained]:
        """Every tensor that trains in this step."""
        return [one for one in self._engine.tune.trained.values() if not one.still]

    def gather(self, *, trains: bool = True) -> None:
        """Look at the whole step first, where a loss is of all its rows."""
        engine = self._engine
        if not engine.objective.looks_at_steps:
            return

        def see(batch: Batch) -> View:
            return engine.objective.see(engine.tune, batch, self.now, **self._given(batch, trains=trains))

        try:
            services_of = lambda slot: engine.services(slot, self.now)  # noqa: E731
            engine.objective.gather(self.batches[: self._real], see, services_of, engine.world)
        finally:
            engine.tune.drawing = None

    def _given(self, batch: Batch, *, trains: bool) -> dict[str, Any]:
        """What a pass over a micro-batch gets."""
        i = next(i for i, one in enumerate(self.batches) if one is batch)
        engine = self._engine
        if engine.objective.looks_at_steps:
            # The model's own dropout must be alike in both passes.
            torch.manual_seed(draws.seed_of(self.now.seed, "step", self.now.step, engine.world.rank, i))
        read = engine.inputs.read(batch, self.now)
        return {
            "read": read,
            "embed": engine.inputs.embed(read, self.now),
            "keep_N": self._keeps[i] if self._keeps is not None and i < self._real else None,
            "services_of": lambda slot: engine.services(slot, self.now),
            "trains": trains,
        }

    def _sums(self, batch: Batch, *, trains: bool) -> Sums:
        i = next(i for i, one in enumerate(self.batches) if one is batch)
        given = self._given(batch, trains=trains)
        sums = self._engine.objective.total(self._engine.tune, batch, self._units, self.now, first=i == 0, **given)
        return sums if i < self._real else Sums(sums.loss * 0.0, {}, Counted(), {})

    def backward(self, batch: Batch) -> None:
        """Forward and backward of one micro-batch."""
        try:
            self._backward(batch, self._sums(batch, trains=True))
        finally:
            self._engine.tune.drawing = None

    def _backward(self, batch: Batch, sums: Sums) -> None:
        value = sums.loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            if self._engine.world.size == 1:
                self._engine.tune.free_gradients()
                raise not_finite("the loss", batch.row_ids)
            # The others are waiting in backward or after it.
            self.broken.append(batch)
        self.total += value
        self.counted = self.counted.plus(sums.counted)
        for name, number in sums.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + number
        for name, noted in sums.notes.items():
            self.notes[name] = self.notes.get(name, Noted()).plus(noted)
        if sums.loss.requires_grad:
            sums.loss.backward()

    def loss(self) -> float:
        """The step's loss without gradients, and without dropout: losses of two points are compared, not of two draws."""
        with evaluating(self._engine.tune.model):
            self.gather(trains=False)
            sums = [self._sums(batch, trains=False) for batch in self.batches]
        self.total = sum(float(one.loss) for one in sums)
        self.counted = reduce(Counted.plus, (one.counted for one in sums), Counted())
        return self._engine.world.sum_numbers([self.total])[0]

    def write(self, trained: TrainedLike, value: torch.Tensor) -> None:
        """Set a trained tensor, and the live weight with it."""
        self._engine.committed = True
        self._engine.tune.set({trained.name: value})

    def apply(self, trained: TrainedLike) -> None:
        """Take the step of one tensor now."""
        one = self._engine.tune.trained[trained.name]
        if one.gradient is not None:
            if "gradients" in self._engine.source.gives:
                self._engine.world.sum(one.gradient)
            if first_not_finite([one]) is not None:
                self._engine.tune.free_gradients()
                raise not_finite(f"the gradient of {one.name}", [row for batch in self.batches for row in batch.row_ids])
            self._engine.committed = True
            self._engine.chain.step(self.now, only=one)

    @contextmanager
    def when_ready(self, do: Callable[[TrainedLike], None]) -> Iterator[None]:
        """Call `do` as soon as a tensor's gradient has arrived; for slices of frozen weights at the end."""
        tune = self._engine.tune
        late: dict[str, TrainedLike] = {}

        def arrived(trained: TrainedLike) -> None:
            if trained.form in ("rows", "cols", "flat"):
                # A tap stands behind its module, whose own backward still needs the old weight.
                late[trained.name] = trained
            else:
                do(trained)

        tune.arrived = arrived
        try:
            yield
        finally:
            tune.arrived = lambda trained: None
        for trained in late.values():
            do(trained)
