"""One run of a sweep: an ordinary run's folder, named by everything its result depends on.

    SWEEP/runs/NAME-1/     the run, as `luthier train` leaves it
    SWEEP/problems/NAME.json  what stopped it, where something did
    SWEEP/logs/NAME.log    what it said

NAME ends in a key made of the recipe with the content of its rows and of a base that lies on this machine, the versions and the
sources of what computes: a run that is finished under its name is the run that would be made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from luthier import disk
from luthier.errors import LuthierError
from luthier.lab.cache import base_key, stage_key
from luthier.lab.jobs import diverged
from luthier.recipe import make_recipe
from luthier.results.folder import FILE, read_run, write_json
from luthier.results.start import located
from luthier.runs.train import train
from luthier.sweep.grid import Variant

_KEY_DIGITS = 10
_AGAIN = "call the same sweep again: it goes on"


class Job(NamedTuple):
    """A run to be made: plain data, so that any process can take it."""

    name: str
    variant: str
    rate: float
    seed: int
    recipe: Mapping[str, Any]
    root: str
    """The sweep's folder."""
    cwd: str
    """The folder in which file names are looked up."""

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.root) / "runs" / f"{self.name}-1"

    @property
    def problem(self) -> Path:
        """Where it is kept what stopped the run."""
        return Path(self.root) / "problems" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """What the run said."""
        return Path(self.root) / "logs" / f"{self.name}.log"


RunAll = Callable[[Sequence[Job]], Generator[Job, None, None]]
"""Does jobs, and gives each when it has ended, well or not. Closing it early stops those under way."""


class Outcome(NamedTuple):
    """What came of a job: the facts of its finished run, or the error that stopped it."""

    facts: Mapping[str, Any] | None
    error: Mapping[str, str] | None = None


def job_of(variant: Variant, rate: float, seed: int, root: Path) -> Job:
    """The run of a variant at a learning rate and a seed."""
    runs = str(root / "runs")
    recipe = located(variant.recipe).model_copy(
        update={"train": variant.recipe.train.model_copy(update={"learning_rate": rate}), "seed": seed, "out": runs}
    )
    key = stage_key(recipe, base_key(recipe.model, recipe.revision), recipe.train.device)[:_KEY_DIGITS]
    name = f"{variant.slug}-rate-{rate:g}-seed-{seed}-{key}".replace("+", "")
    return Job(name, variant.name, rate, seed, {**recipe.as_plain(), "name": name}, str(root), os.getcwd())


def train_here(job: Job) -> None:
    """Make a job's run in this process, or go on with it. The run's folder tells what came of it, or the file of its problem."""
    # Ray's workers begin elsewhere.
    os.chdir(job.cwd)
    job.problem.unlink(missing_ok=True)
    begun = (job.folder / FILE).is_file()
    if not begun:
        # A kill may have left a folder that holds nothing yet.
        disk.remove(job.folder)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8", buffering=1) as log:
        try:
            train(
                make_recipe(job.recipe, where=job.name),
                resume=job.folder if begun else None,
                say=lambda text: print(text, file=log),
                command=f"luthier train {job.folder / 'recipe.yaml'}",
            )
        except LuthierError as error:
            keep_problem(job, error)


def keep_problem(job: Job, error: LuthierError) -> None:
    """Note what stopped a run."""
    job.problem.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.problem, error.as_json())


def keep_crash(job: Job, how: str) -> None:
    """Note that a run's process ended on its own, unless the run had told why."""
    if not job.problem.is_file():
        keep_problem(job, LuthierError(f"the run's process ended before its work was done ({how})", where=str(job.log), fix=_AGAIN))


def outcome(job: Job) -> Outcome:
    """What came of a job that has ended."""
    try:
        if (job.folder / FILE).is_file():
            facts = read_run(job.folder).facts
            if facts.get("status") == "finished":
                return Outcome(facts)
        if job.problem.is_file():
            return Outcome(None, json.loads(job.problem.read_text(encoding="utf-8")))
    except LuthierError as error:
        return Outcome(None, error.as_json())
    return Outcome(None, LuthierError("the run was stopped", where=str(job.folder), fix=_AGAIN).as_json())


def is_done(job: Job) -> bool:
    """Whether a job need not be done: its run is finished, or its numbers were not finite, which they would be again."""
    found = outcome(job)
    return found.facts is not None or diverged(LuthierError((found.error or {}).get("error", "")))
