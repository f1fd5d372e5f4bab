"""A run through the real loop that is killed between any two events, in as many processes as it takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.kinds import Batch
from luthier.rows.encode import Encoded, EncodedRows
from luthier.training.checkpoint import latest, restore, save
from luthier.training.engine import Engine, StepResult
from luthier.training.feed import Feed
from luthier.training.loop import Clock, Plans, Progress, train
from luthier.training.schedule import find_schedule
from tests.unit.test_kinds_resume import assert_equal, everything


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
    if batch.groups:
        rows = [replace(rows[group[0]], mates=tuple(rows[place] for place in group[1:])) for group in batch.groups]
    return EncodedRows.of(rows)


class WithIdle(Feed):
    """A feed in which some steps have no target."""

    idle: Collection[int] = ()

    def at(self, step: int) -> tuple[float, list[Batch]]:
        """As every feed; no token of an idle step is a target."""
        epoch, batches = super().at(step)
        if step in self.idle:
            batches = [batch._replace(label_BT=torch.full_like(batch.label_BT, -100)) for batch in batches]
        return epoch, batches


class KilledError(Exception):
    """The process ended here."""


Curve = Mapping[int, float]


@dataclass
class Life:
    """One run."""

    make: Callable[[Clock], Engine]
    """Attaches it to a model, in a process of its own."""
    rows: Batch
    folder: Path
    steps: int
    idle: Collection[int]
    """The steps in which no token is a target."""
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
        clock = Clock(self.steps, 0.01, find_schedule("linear"), 0, seed=0)
        engine = self.make(clock)
        clock.turns = engine.tune.turns
        self.counted = [step for step in range(1, self.steps + 1) if clock.settled(step)]
        progress, newest = Progress(), latest(self.folder)
        if newest is not None:
            progress = Progress.resumed(restore(newest, engine))
        feed = WithIdle(encoded(self.rows), seed=0, micro_batch_tokens=48, steps=self.steps, batch_rows=3)
        feed.idle = self.idle

        def event(what: str) -> None:
            if kill == (what, progress.step):
                raise KilledError

        def tell(at: Progress, result: StepResult) -> None:
            assert result.skipped == (at.step - 1 in self.idle)
            self.at_step.setdefault(at.step, []).append(everything(engine))
            self.said |= {at.step} if result.said else set()
            event("told")

        def measure() -> dict[str, tuple[float, bool]]:
            engine.tune.model.eval()
            # Who measures may draw, and runs the model.
            torch.rand(3)
            with torch.no_grad():
                engine.services("measuring", clock.at(progress.step, 0.0)).forward(self.rows.take(torch.arange(2)), ["nll"])
            event("measured")
            return {"set": (self.curve[progress.step], False)}

        def keep(at: Progress) -> None:
            if at.step == self.steps or at.stopped:
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
