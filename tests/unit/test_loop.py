"""The loop on an engine that takes no real steps: what is logged, when is evaluated and saved, and when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.kinds import Callback, Now
from luthier.training import loop
from luthier.training.engine import Kept, StepResult
from luthier.training.loop import ASKED, Clock, Plans, Progress, train
from luthier.training.schedule import constant
from luthier.training.world import World

RESULT = StepResult(2.0, 1.5, {"cross_entropy": 2.0}, tokens=10, supervised=4, rows=2, kept=1.0)


class Steps:
    """An engine whose steps give what they are told to, and that remembers when its numbers were best."""

    def __init__(self, *results: StepResult, callbacks: Sequence[Kept] = ()) -> None:
        self.results, self.callbacks = list(results), list(callbacks)
        self.tune, self.world = SimpleNamespace(model=torch.nn.Linear(1, 1)), World()
        self.states: dict[str, Any] = {}
        self.committed = False
        self.best: list[int] = []
        self.taken = 0

    def step(self, batches: Any, now: Now) -> StepResult:
        self.taken += 1
        return self.results.pop(0) if self.results else RESULT

    def services(self, slot: str, now: Now) -> Any:
        return now

    def keep_best(self) -> None:
        self.best.append(self.taken)

    def go_back_to_best(self) -> None:
        self.best.append(-1)


class Rows:
    """Gives nothing to run."""

    micro_batch_tokens = 64

    def at(self, step: int) -> tuple[float, list[Any]]:
        return step / 4, []


def run(engine: Any, steps: int = 4, plans: Plans | None = None, progress: Progress | None = None, **more: Any) -> Progress:
    feed: Any = Rows()
    return train(engine, feed, Clock(steps, 0.5, constant, 0, 0), plans or Plans(), progress or Progress(), **more)


def test_a_step_is_logged_with_what_there_is_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock ticks whenever it is looked at."""
    ticks = count(100.0, 2.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(ticks))
    several = RESULT._replace(parts={"cross_entropy": 1.5, "kl": 0.5}, kept=0.75, notes={"norm": 3.0})
    skipped = RESULT._replace(tokens=3, supervised=0, kept=0.0, skipped=True)
    progress = run(Steps(RESULT, several, skipped, RESULT))
    assert (progress.step, progress.tokens, progress.supervised, progress.empty_steps) == (4, 33, 12, 1)
    # From before the rows are fetched to behind the step; a line is told its own moment.
    assert progress.seconds == 8.0 and [line["seconds"] for line in progress.history] == [4.0] * 4
    plain, told, empty, last = progress.history
    assert [line["step"] for line in progress.history] == [1, 2, 3, 4] and told["epoch"] == 0.25
    assert plain["loss"] == 2.0 and plain["nll"] == 1.5 and plain["learning_rate"] == 0.5
    assert not {"parts", "mean_weight", "notes"} & (plain.keys() | last.keys() | empty.keys())
    assert (told["parts"], told["mean_weight"], told["notes"]) == (several.parts, 0.75, {"norm": 3.0})
    assert empty["loss"] is None and empty["nll"] is None


def test_what_is_due_at_the_end_is_done_once() -> None:
    saved: list[int] = []
    evaluated: list[int] = []
    engine = Steps()

    def evaluate() -> Mapping[str, tuple[float, bool]]:
        evaluated.append(engine.taken)
        return {"held out": (1.0, False)}

    progress = run(
        engine, 5, Plans(save_every=2, evaluate_every=3), evaluate=evaluate, save=lambda progress: saved.append(progress.step)
    )
    assert engine.taken == 5 and saved == [2, 4, 5] and evaluated == [3, 5]
    assert progress.evaluations == [{"step": step, "metrics": {"held out": 1.0}} for step in (3, 5)]
    assert not engine.best, "nothing was to be best"
    assert not engine.tune.model.training


@pytest.mark.parametrize("higher", [True, False])
def test_a_run_ends_after_so_many_evaluations_that_are_no_better(higher: bool) -> None:
    """An equal value is no better one, and a better one begins the count anew."""
    values = iter([1.0, 1.0, 2.0, 2.0, 1.5, 9.0] if higher else [2.0, 2.0, 1.0, 1.0, 1.5, 0.0])
    engine = Steps()
    plans = Plans(evaluate_every=1, patience=2, best="score")
    progress = run(engine, 6, plans, evaluate=lambda: {"score": (next(values), higher)})
    assert progress.step == 5 and progress.stopped == "score has not improved in 2 evaluations"
    assert not progress.interrupted and (progress.best, progress.since_best) == (2.0 if higher else 1.0, 2)
    assert engine.best == [1, 3, -1]


def test_what_acts_at_the_end_of_a_stage_sees_its_last_step() -> None:
    seen: list[Now] = []
    callbacks = [
        Kept("one", Callback(after_stage=lambda state, services: seen.append(services)), {}),  # type: ignore[arg-type]
        Kept("other", Callback(), {}),
    ]
    run(Steps(callbacks=callbacks), 3)
    assert [(now.step, now.steps, now.epoch, now.learning_rate) for now in seen] == [(2, 3, 0.0, 0.5)]


def test_smaller_micro_batches_are_told_once() -> None:
    heard: list[str] = []
    limits: list[int] = []
    feed: Any = SimpleNamespace(micro_batch_tokens=64, limit=limits.append)
    progress = Progress(step=4, notes=["first", "second"])
    loop._shrink(feed, [SimpleNamespace(tokens=40)], progress, heard.append)  # type: ignore[list-item]
    assert heard == ["micro-batches halved to 20 tokens after step 5 ran out of memory"]
    assert progress.notes == ["first", "second", *heard] and progress.micro_batch_tokens == 20 and limits == [20]


def test_a_stop_that_was_asked_for_is_over_when_a_run_goes_on() -> None:
    engine = Steps()
    engine.world = SimpleNamespace(any=lambda flag: engine.taken == 2)  # type: ignore[assignment]
    saved: list[int] = []
    asked = run(engine, 5, Plans(save_every=4, best="score"), save=lambda progress: saved.append(progress.step))
    assert (asked.step, asked.stopped, asked.interrupted, saved) == (2, ASKED, True, [2])
    assert not engine.best, "a run that goes on later has no result yet"
    again = Progress.resumed(vars(asked))
    assert (again.step, again.stopped, again.interrupted) == (2, "", False)
    done = Progress(step=3, stopped="no better", interrupted=False)
    assert Progress.resumed(vars(done)) == done
    assert run(Steps(), 5, progress=Progress.resumed(vars(done))).step == 3
