"""Every technique through the real loop, killed between any two events: a run with evaluation, `best`, a step without targets and a
narrow type; and one that stops for want of patience. What is resumed is what would have been, bit for bit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.kinds import Batch
from luthier.rows.encode import Encoded, EncodedRows
from luthier.training.checkpoint import latest, restore, save
from luthier.training.engine import Engine, StepResult
from luthier.training.feed import Feed
from luthier.training.loop import Clock, Plans, Progress, train
from luthier.training.schedule import find_schedule
from tests.contracts.combinations import traits
from tests.contracts.fixtures import OPTIONS, RUNS, rows_for, run_of
from tests.toys.helpers import model_of, toys  # noqa: F401
from tests.unit.test_kinds_resume import assert_equal, everything

STEPS, NEVER = 6, -1
LOOPED: dict[str, dict[str, Any]] = {
    "adalora": {"warmup": 0.2, "final": 0.3},
    "caft": {"heads_first": 0.34},
    "in_turns": {"forget": True},
    "masked_thought": {"warmup": 0.5},
}
"""Options with which phases end within so few steps, or more is remembered."""
STIRRED = {"dropout": 0.2, "noise": 0.1}
"""Options that draw in every pass: whoever measures in mid-run must not move the draws."""


def with_dropout() -> Any:
    """A tiny model that drops some of its attention while it learns."""
    model = model_of()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model


def encoded(batch: Batch) -> EncodedRows:
    """The rows of a batch as they come from encoding."""
    rows = []
    for i, row in enumerate(batch.row_ids):
        real = batch.attend_BT[i]
        columns: dict[str, Any] = {name: float(values[i]) for name, values in batch.columns.items() if not values[i].isnan()}
        columns |= {name: texts[i] for name, texts in batch.texts.items()}
        tokens = {name: tuple(values[i][real].tolist()) for name, values in batch.token_columns.items()}
        targets = tuple((batch.label_BT[i][real] >= 0).tolist())
        rows.append(
            Encoded(row, tuple(batch.token_ids_BT[i][real].tolist()), targets, "", columns, 0, "text", token_columns=tokens)
        )
    return EncodedRows.of(rows)


class WithIdle(Feed):
    """A feed in which one step has no target."""

    idle: int = NEVER

    def at(self, step: int) -> tuple[float, list[Batch]]:
        """As every feed; no token of the idle step is a target."""
        epoch, batches = super().at(step)
        if step == self.idle:
            batches = [batch._replace(label_BT=torch.full_like(batch.label_BT, -100)) for batch in batches]
        return epoch, batches


class KilledError(Exception):
    """The process ended here."""


Curve = Mapping[int, float]


@dataclass
class Life:
    """One run of a technique, in as many processes as it takes."""

    kind: str
    name: str
    folder: Path
    dtype: torch.dtype
    idle: int
    plans: Plans
    curve: Curve = field(default_factory=dict)
    """What is measured after each step; lower is better."""
    at_step: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """All numbers of the run after each step, as often as it was taken."""
    at_end: dict[str, Any] = field(default_factory=dict)
    """All numbers when the last step was done, before anything else is done with them."""
    said: set[int] = field(default_factory=set)
    """Steps behind which techniques changed what trains."""
    counted: list[int] = field(default_factory=list)
    """Steps after which the run is in the last phase of every technique: those of which one may be the best."""

    def process(self, kill: tuple[str, int] | None = None) -> tuple[Engine, Progress] | None:
        """Go on from the newest checkpoint to the end; None where the process is killed by an event (`told` of a step, `measured`,
        `saved`) on the way."""
        clock = Clock(STEPS, 0.01, find_schedule("linear"), 0, seed=0)
        options = {o: value for o, value in STIRRED.items() if (self.kind, self.name, o) in OPTIONS}
        engine = run_of(
            self.kind,
            self.name,
            {**LOOPED.get(self.name, {}), **options},
            model=with_dropout(),
            dtype=self.dtype,
            now=clock.at(0, 0.0),
        )
        clock.turns = engine.tune.turns
        self.counted = [step for step in range(1, STEPS + 1) if clock.settled(step)]
        progress, newest = Progress(), latest(self.folder)
        if newest is not None:
            progress = Progress.resumed(restore(newest, engine))
        feed = WithIdle(encoded(rows_for([self.kind])), seed=0, micro_batch_tokens=48, steps=STEPS, batch_rows=3)
        feed.idle = self.idle

        def event(what: str) -> None:
            if kill == (what, progress.step):
                raise KilledError

        def tell(at: Progress, result: StepResult) -> None:
            assert result.skipped == (at.step - 1 == self.idle)
            self.at_step.setdefault(at.step, []).append(everything(engine))
            self.said |= {at.step} if result.said else set()
            event("told")

        def measure() -> dict[str, tuple[float, bool]]:
            engine.tune.model.eval()
            # Who measures may draw, and runs the model.
            torch.rand(3)
            with torch.no_grad():
                engine.services("measuring", clock.at(progress.step, 0.0)).forward(
                    rows_for([self.kind]).take(torch.arange(2)), ["nll"]
                )
            event("measured")
            return {"set": (self.curve[progress.step], False)}

        def keep(at: Progress) -> None:
            if at.step == STEPS or at.stopped:
                self.at_end = everything(engine)
                return
            save(self.folder / f"step-{at.step}", engine, asdict(at))
            event("saved")

        measured: Callable[[], Mapping[str, tuple[float, bool]]] | None = measure if self.plans.evaluate_every else None
        try:
            train(engine, feed, clock, self.plans, progress, evaluate=measured, save=keep, tell=tell)
        except KilledError:
            return None
        return engine, progress


def assert_best(found: Mapping[str, Any], best: Mapping[str, Any]) -> None:
    """What is trained is what it was: the model's numbers, their masters, and which they are; where an average is the result, the
    average as it was."""
    averages = {key.replace("state average ", "master "): one for key, one in best.items() if key.startswith("state average ")}
    if averages:
        assert_equal({key: one for key, one in found.items() if key.startswith("master ")}, averages)
        return
    left, right = (
        {key: value for key, value in one.items() if key.split(" ")[0] in ("live", "master", "index", "frozen")}
        for one in (found, best)
    )
    for key in left.keys() & right.keys():
        if key.startswith("master ") and left[key].dtype != right[key].dtype:
            # What stands still and was forgotten is held by the model alone, in the model's type.
            left[key], right[key] = left[key].bfloat16(), right[key].bfloat16()
    assert_equal(left, right)


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_killed_between_any_two_events_and_measured_all_the_time(tmp_path: Path, kind: str, name: str) -> None:
    """In bf16 with fp32 masters, one step of six without a target. Measured after every step with `best`, killed after each and
    resumed, the run ends with the bits of one that nobody measured or killed; then the best numbers are those of then."""
    # Where a prompt has targets of its own, every row has one.
    idle = NEVER if "learns its prompt" in traits[kind, name] else 1 + zlib.crc32(name.encode()) % 3
    plain = Life(kind, name, tmp_path / "plain", torch.bfloat16, idle, Plans())
    assert plain.process() is not None
    if idle != NEVER and idle + 1 not in plain.said:
        assert_equal(plain.at_step[idle + 1][0], plain.at_step[idle][0])
    curve = dict(zip(range(1, STEPS + 1), (3.0, 4.0, 1.0, 2.0, 1.0, 5.0), strict=True))
    hard = Life(kind, name, tmp_path / "hard", torch.bfloat16, idle, Plans(save_every=1, evaluate_every=1, best="set"), curve)
    for kill in (("told", 2), ("measured", 3), ("saved", 3), ("saved", 4), ("saved", 5)):
        assert hard.process(kill) is None
    ended = hard.process()
    assert ended is not None
    for step, taken in hard.at_step.items():
        for one in taken:
            assert_equal(one, plain.at_step[step][0])
    engine, progress = ended
    assert_equal(hard.at_end, plain.at_end)
    best = min(hard.counted, key=lambda step: curve[step])
    assert progress.best == curve[best] and [one["step"] for one in progress.evaluations] == list(range(1, STEPS + 1))
    assert progress.empty_steps == (idle != NEVER) and not progress.stopped
    assert_best(everything(engine), hard.at_step[best][0])


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_patience_ends_a_run_with_its_best_numbers(tmp_path: Path, kind: str, name: str) -> None:
    """In fp64: two evaluations without improvement end the run, and the numbers are those of the best one, bit for bit; also when it
    was killed between the two. Evaluations before the last phase of a technique do not count."""
    plans = Plans(save_every=1, evaluate_every=1, best="set", patience=2)
    idle = NEVER if "learns its prompt" in traits[kind, name] else 2
    life = Life(kind, name, tmp_path, torch.float64, idle, plans, {1: 2.0, 2: 1.0, 3: 1.0, 4: 3.0, 5: 3.0, 6: 3.0})
    assert life.process(("told", 4)) is None
    ended = life.process()
    assert ended is not None
    engine, progress = ended
    best = min(life.counted, key=lambda step: life.curve[step])
    assert (progress.step, progress.best, progress.interrupted) == (min(best + 2, STEPS), life.curve[best], False)
    assert progress.stopped == ("set has not improved in 2 evaluations" if best + 2 <= STEPS else "")
    first, again = life.at_step[4]
    assert_equal(again, first)
    assert_best(everything(engine), life.at_step[best][0])
