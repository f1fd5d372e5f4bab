"""The training loop: fetch, step, log, evaluate, save. What a step is stands in `engine.py`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import Say, silent
from luthier.kinds import Batch, Now
from luthier.training import memory
from luthier.training.cores import CoreWatch
from luthier.training.engine import Engine, StepResult
from luthier.training.feed import Feed
from luthier.training.schedule import Schedule, factor
from luthier.tune.turns import Turns


@dataclass
class Clock:
    """How the learning rate and the position in the run follow from the step."""

    steps: int
    learning_rate: float
    schedule: Schedule
    warmup: int
    seed: int
    stage: int = 0
    stages: int = 1
    turns: Turns = field(default_factory=Turns)
    """With the phases of some techniques the schedule begins again."""

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with at a step."""
        bounds = [0, *self.turns.restarts(self.steps), self.steps]
        begin = max(bound for bound in bounds[:-1] if bound <= step)
        steps = min((bound for bound in bounds if bound > begin), default=self.steps) - begin
        return factor(self.schedule, step - begin, steps, round(self.warmup * steps / max(1, self.steps)))

    def at(self, step: int, epoch: float) -> Now:
        """The clock at a step."""
        now = self.factor(step)
        return Now(step, self.steps, epoch, self.stage, self.stages, now, self.learning_rate * now, self.seed)

    def first(self, slot: str) -> Now:
        """The clock at the first step in which a technique may move."""
        return self.at(self.turns.first(slot, self.steps), 0.0)

    def settled(self, steps: int) -> bool:
        """Whether so many steps reach into the last phase of every technique: what is learned then is of the kind that the run ends in."""
        return all(steps > border for border in self.turns.borders(self.steps))


@dataclass
class Plans:
    """What happens around the steps."""

    save_every: int | None = None
    evaluate_every: int | None = None
    patience: int | None = None
    best: str | None = None


ASKED = "asked to stop"


@dataclass
class Progress:
    """Where the loop is; all of it goes into checkpoints."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    supervised: int = 0
    empty_steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    since_best: int = 0
    stopped: str = ""
    """Why the run ended before its last step."""
    interrupted: bool = False
    """It ended because someone asked, and can be resumed."""
    micro_batch_tokens: int | None = None
    """The most tokens of a micro-batch since memory ran out; none: as the recipe says."""
    notes: list[str] = field(default_factory=list)
    """What happened that a reader of the report should know."""

    @classmethod
    def resumed(cls, saved: Mapping[str, Any]) -> Progress:
        """From what a checkpoint holds: a stop that was asked for is over, one that the run came to by itself stands."""
        stopped = "" if saved["stopped"] == ASKED else saved["stopped"]
        return cls(**{**saved, "stopped": stopped, "interrupted": False})


Evaluate = Callable[[], Mapping[str, tuple[float, bool]]]
"""Measures the evaluation sets: value and whether higher is better, by name."""


def train(
    engine: Engine,
    feed: Feed,
    clock: Clock,
    plans: Plans,
    progress: Progress,
    *,
    evaluate: Evaluate | None = None,
    save: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[Progress, StepResult], None] = lambda progress, result: None,
    say: Say = silent,
) -> Progress:
    """Train from `progress.step` to the end, or until a stop is asked for.

    Args:
        engine: takes the steps.
        feed: gives each step's micro-batches.
        clock: gives each step its learning rate.
        plans: when to evaluate, save and stop.
        progress: where to begin; changed as the run goes on.
        evaluate: measures the evaluation sets in mid-run.
        save: writes a checkpoint; also when training has ended, before anything else is done with its result.
        tell: hears of every step.
        say: hears what is done differently from what the recipe says.

    Raises:
        LuthierError: the loss or a gradient is not finite, or memory ran out and smaller micro-batches cannot help; nothing of
            the failed step was saved.
    """
    engine.tune.model.train()
    if progress.micro_batch_tokens is not None:
        feed.limit(min(progress.micro_batch_tokens, feed.micro_batch_tokens))
    cores = CoreWatch()
    with stop_politely() as asked_to_stop:
        while progress.step < clock.steps and not progress.stopped:
            began = time.perf_counter()
            epoch, batches = feed.at(progress.step)
            now = clock.at(progress.step, epoch)
            while (result := memory.attempt(engine, batches, now)) is None:
                _shrink(feed, batches, progress, say)
                _, batches = feed.at(progress.step)
            progress.step += 1
            progress.seconds += time.perf_counter() - began
            _log(progress, result, now, time.perf_counter() - began)
            tell(progress, result)
            if (busy := cores.word()) is not None:
                say(busy)
                progress.notes.append(busy)
            if evaluate is not None and _due(progress.step, plans.evaluate_every, clock.steps):
                _judge(engine, progress, plans, evaluate(), counts=clock.settled(progress.step))
            if engine.world.any(asked_to_stop()):
                progress.stopped, progress.interrupted = progress.stopped or ASKED, True
            ended = progress.stopped or progress.step == clock.steps
            if ended or _due(progress.step, plans.save_every, clock.steps):
                save(progress)
    engine.tune.model.eval()
    if progress.interrupted:
        return progress
    # First, so that the result is what techniques make of it when a stage ends.
    if plans.best is not None:
        engine.go_back_to_best()
    for kept in engine.callbacks:
        if kept.callback.after_stage is not None:
            kept.callback.after_stage(kept.state, engine.services(kept.slot, clock.at(clock.steps - 1, epoch=0.0)))
    return progress


def _due(step: int, every: int | None, last: int | None) -> bool:
    return every is not None and (step % every == 0 or step == last)


def _shrink(feed: Feed, batches: Sequence[Batch], progress: Progress, say: Say) -> None:
    tokens = memory.smaller(batches, feed.micro_batch_tokens)
    feed.limit(tokens)
    progress.micro_batch_tokens = tokens
    progress.notes.append(f"micro-batches halved to {tokens} tokens after step {progress.step + 1} ran out of memory")
    say(progress.notes[-1])


def _log(progress: Progress, result: StepResult, now: Now, seconds: float) -> None:
    progress.tokens += result.tokens
    progress.supervised += result.supervised
    progress.empty_steps += result.skipped
    line: dict[str, Any] = {
        "step": progress.step,
        "epoch": round(now.epoch, 4),
        "loss": None if result.skipped else result.loss,
        "nll": None if result.skipped else result.nll,
        "learning_rate": now.learning_rate,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised,
        "seconds": seconds,
    }
    if len(result.parts) > 1:
        line["parts"] = result.parts
    if result.kept != 1.0 and not result.skipped:
        line["mean_weight"] = result.kept
    if result.weights is not None and not result.skipped:
        line |= result.weights._asdict()
    if result.notes:
        line["notes"] = dict(result.notes)
    progress.history.append(line)


def _judge(engine: Engine, progress: Progress, plans: Plans, values: Mapping[str, tuple[float, bool]], *, counts: bool) -> None:
    """Log an evaluation, and let it decide what is best where it counts: a state of an earlier phase is no result of the run."""
    progress.evaluations.append({"step": progress.step, "metrics": {name: value for name, (value, _) in values.items()}})
    engine.tune.model.train()
    if plans.best is None or not counts:
        return
    if plans.best not in values:
        # Its answers could not be scored this time, which a note tells.
        return
    value, higher = values[plans.best]
    if progress.best is None or (value > progress.best if higher else value < progress.best):
        progress.best, progress.since_best = value, 0
        engine.keep_best()
        return
    progress.since_best += 1
    if plans.patience is not None and progress.since_best >= plans.patience:
        progress.stopped = f"{plans.best} has not improved in {plans.patience} evaluations"


@contextmanager
def stop_politely() -> Iterator[Callable[[], bool]]:
    """Let the first interrupt finish the step; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    heard: set[int] = set()

    def note(number: int, frame: Any) -> None:
        # A launcher that was interrupted itself passes on another signal: only the same one twice means "at once".
        if number in heard:
            raise KeyboardInterrupt
        heard.add(number)
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
