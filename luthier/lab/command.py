"""What `luthier replicate` does: list the replications, run one or all, test the lab itself, forget what was kept."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.markup import escape

from luthier.errors import LuthierError, Say
from luthier.lab import calibrating, replications
from luthier.lab.cache import forget, kept_bytes, lab_folder
from luthier.lab.listing import listed, table
from luthier.lab.pool import workers
from luthier.lab.real import FOLDER, missing
from luthier.lab.replication import Replication
from luthier.lab.results import Result, file_stem, result_of, save, shown
from luthier.lab.runner import Lab, run_replication
from luthier.lab.verdicts import in_words, worded
from luthier.report.words import size

TOLD_BYTES = 2**30
"""From here on the lab says what its finished runs take."""
_UNITS = {"s": 1 / 60, "m": 1.0, "h": 60.0}


class Asked(NamedTuple):
    """The command's options."""

    name: str | None = None
    seeds: int | None = None
    """None: as many as the lab's rule asks for."""
    model: str | None = None
    every: bool = False
    listed: bool = False
    calibrated: bool = False
    forgotten: bool = False
    budget: str | None = None
    """`90s`, `60m` or `2h`."""
    jobs: int | None = None
    """None: one for each processor core."""
    device: str = "cpu"
    out: Path = Path("replications")


class Answer(NamedTuple):
    """For scripts, and for people."""

    facts: Any
    render: Callable[[], RenderableType]


def answer(asked: Asked, say: Say) -> Answer:
    """Do what was asked.

    Raises:
        LuthierError: an unknown replication, options that make no sense, or a replication that could not be run.
    """
    wanted = [asked.name is not None, asked.every, asked.listed, asked.calibrated, asked.forgotten]
    if sum(wanted) != 1:
        raise LuthierError(
            "a replication is missing" if not any(wanted) else "only one thing can be done at a time",
            where="luthier replicate",
            fix="give a replication's name, --all, --list, --calibrate or --forget",
        )
    if asked.forgotten:
        folder = forget()
        return Answer({"forgotten": str(folder)}, lambda: f"removed {escape(str(folder))}")
    if asked.listed:
        lines = listed(asked.out)
        return Answer(lines, lambda: table(lines))
    if asked.seeds is not None and asked.seeds < 1:
        raise LuthierError(f"{asked.seeds} seeds", where="--seeds", fix="use 1 or more; an interval needs 2")
    if asked.calibrated:
        return _calibrated(asked, say)
    budget = minutes_of(asked.budget)
    if asked.name is not None:
        if budget is not None:
            raise LuthierError("a budget is for all replications", where="--budget", fix="use it with --all")
        replication = replications.find(asked.name)
        with _lab(asked, say) as lab:
            result = _run(replication, asked, lab)
        return Answer(result, lambda: shown(result))
    return run_all(asked, budget, say)


def _calibrated(asked: Asked, say: Say) -> Answer:
    for given, option in ((asked.seeds, "--seeds"), (asked.model, "--model"), (asked.budget, "--budget")):
        if given is not None:
            raise LuthierError("the lab's own test is fixed", where=option, fix=f"leave {option} out")
    with _lab(asked, say) as lab:
        facts = calibrating.run(lab)
    say(f"written: {calibrating.save(facts, asked.out)}")
    return Answer(facts, lambda: calibrating.shown(facts))


def minutes_of(budget: str | None) -> float | None:
    """`90s`, `60m` or `2h` in minutes.

    Raises:
        LuthierError: it is none of these.
    """
    if budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if found is None:
        raise LuthierError(f"`{budget}` is no length of time", where="--budget", fix="write e.g. 90s, 60m or 2h")
    return float(found[1]) * _UNITS[found[2]]


def run_all(asked: Asked, budget: float | None, say: Say) -> Answer:
    """Run the replications one by one, the quickest first, and none that would take longer than what is left of the budget or that needs
    data sets that are not there.

    Raises:
        LuthierError: some replications could not be run; those after them were, and all results are written.
    """
    began = time.monotonic()
    results: list[Result] = []
    left_out: list[dict[str, Any]] = []
    failed: list[tuple[str, LuthierError]] = []
    with _lab(asked, say) as lab:
        for replication in sorted(
            map(replications.find, replications.names()), key=lambda replication: (replication.minutes, replication.name)
        ):
            if lacks := missing(replication):
                left_out.append({"name": replication.name, "minutes": replication.minutes, "missing": lacks})
                say(f"{replication.name} is left out: {FOLDER} has no {', '.join(lacks)}")
                continue
            left = None if budget is None else budget - (time.monotonic() - began) / 60
            if left is not None and replication.minutes > left:
                left_out.append({"name": replication.name, "minutes": replication.minutes})
                say(
                    f"{replication.name} is left out: it takes about {replication.minutes:g} minutes, and {max(left, 0):.0f} are left"
                )
                continue
            try:
                results.append(_run(replication, asked, lab))
            except LuthierError as error:
                failed.append((replication.name, error))
                say(f"{replication.name} stopped: {error.what}")
    if failed:
        (_, first), names = failed[0], ", ".join(name for name, _ in failed)
        raise LuthierError(f"these replications stopped: {names}; the first because {first.what}", where=first.where, fix=first.fix)
    return Answer({"results": results, "left_out": left_out}, lambda: _summary(results, left_out))


def _run(replication: Replication, asked: Asked, lab: Lab) -> Result:
    ran = run_replication(replication, lab, seeds=asked.seeds, model=asked.model)
    result = result_of(ran)
    for path in save(result, asked.out, file_stem(replication, asked.model)):
        lab.say(f"written: {path}")
    return result


@contextmanager
def _lab(asked: Asked, say: Say) -> Iterator[Lab]:
    jobs = _cores() if asked.jobs is None else asked.jobs
    if jobs < 1:
        raise LuthierError(f"{jobs} jobs at a time", where="--jobs", fix="use 1 or more")
    with workers(jobs) as do_all:
        yield Lab(lab_folder(), do_all, asked.device, say)
    kept = kept_bytes()
    if kept >= TOLD_BYTES:
        say(f"finished runs take {size(kept)} in {lab_folder()}: `luthier replicate --forget` removes them")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _summary(results: list[Result], left_out: list[dict[str, Any]]) -> Group:
    lines: list[RenderableType] = [
        f"[bold]{escape(one['replication'])}[/bold]: {worded({'verdict': one['verdict'], 'words': in_words(one)})}"
        for one in results
    ]
    lines += [f"[dim]left out: {escape(one['name'])}, about {one['minutes']:g} minutes[/dim]" for one in left_out]
    return Group(*lines)
