"""The control of a run: the finished run that its recipe asks to be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.recipe import read_recipe, same_steps
from luthier.results.folder import Run, list_runs, read_run


def find_control(named: str | None, out: str) -> Run | None:
    """The run that a recipe's `control` names among the runs under `out`; None where it names none.

    A recipe file stands for its newest finished run under `out`; anything else is a run's folder, or its name under `out`.

    Raises:
        LuthierError: there is no such run or file, the run has not finished, or the recipe has no finished run.
    """
    if named is None:
        return None
    if Path(named).is_file():
        return _newest_run_of(Path(named), out)
    try:
        run = read_run(named, out)
    except LuthierError as error:
        raise LuthierError(error.what, where=f"baseline_run, under {error.where}", fix=error.fix) from None
    status = run.facts.get("status", "unknown")
    if status != "finished":
        raise LuthierError(
            f"the control `{named}` has not finished ({status})",
            where="baseline_run",
            fix=f"{'wait for it' if status == 'running' else f'luthier train --resume {run.folder}'}, or name another run",
        )
    return run


def _newest_run_of(file: Path, out: str) -> Run:
    wanted = _what_it_does(read_recipe(file).as_plain())
    for run in reversed(list_runs(out)):
        if run.facts.get("status") == "finished" and same_steps(_what_it_does(run.facts.get("recipe") or {}), wanted):
            return run
    raise LuthierError(
        f"the control `{file}` has no finished run in `{out}`",
        where="baseline_run",
        fix=f"run it first, as it stands: luthier train {file} out={out}; or name the folder of a run",
    )


def _what_it_does(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the folder its runs lie in, and without what they are compared with in turn."""
    return {key: value for key, value in plain.items() if key not in ("out", "baseline_run")}
