"""Runs the lab's test of itself: how many known effects it finds, and how many differences it finds where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from luthier import machine
from luthier.lab.calibration import EFFECTS, FURTHER, NULLS
from luthier.lab.replication import Replication
from luthier.lab.results import machine_in_words, result_of
from luthier.lab.runner import Lab, run_replication
from luthier.lab.verdict import HOLDS, TWO_LOOKS
from luthier.lab.verdicts import CALIBRATION, colored, difference, rule_facts
from luthier.results.folder import write_json

Result = dict[str, Any]


def run(lab: Lab) -> Result:
    """Run every comparison by the lab's rule, as plain data.

    Returns:
        `effects`, `nulls` and `further`, one entry a comparison with `name`, `says`, its expectation, its `differences` and `found`:
        of an effect whether it holds, of a null whether either direction is said to hold. `counts` has how many were found, and of
        how many. `seconds` and `runs` are those of all comparisons, so that a run that several share counts in each.
    """
    told = {kind: [_told(replication, lab) for replication in replications] for kind, replications in _kinds().items()}
    every = [one for several in told.values() for one in several]
    versions = machine.versions()
    return {
        **told,
        "counts": {kind: [sum(one["found"] for one in several), len(several)] for kind, several in told.items()},
        "rule": rule_facts(TWO_LOOKS),
        "seconds": sum(one["seconds"] for one in every),
        "runs": sum(one["runs"] for one in every),
        "model": every[0]["model"],
        "versions": {name: versions[name] for name in ("luthier", "torch", "transformers", "python")},
        "machine": machine_in_words(),
    }


def _kinds() -> dict[str, Sequence[Replication]]:
    return {"effects": EFFECTS, "nulls": NULLS, "further": FURTHER}


def _told(replication: Replication, lab: Lab) -> Result:
    result = result_of(run_replication(replication, lab))
    main, verdicts = result["expectations"][0], [one["verdict"] for one in result["expectations"]]
    kept = ("measure", "variant", "versus", "direction", "margin", "differences", "mean", "interval", "verdict")
    return {
        "name": replication.name,
        "title": replication.title,
        "says": replication.says,
        "unit": replication.unit,
        **{key: main[key] for key in kept},
        "found": HOLDS in verdicts,
        "seeds": len(result["seeds"]),
        "numbers": {variant["name"]: variant["numbers"] for variant in result["variants"]},
        "model": result["model"],
        "seconds": result["seconds"],
        "runs": result["runs"],
    }


def save(facts: Result, folder: Path) -> Path:
    """Write what was found. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{CALIBRATION}.json"
    write_json(path, facts)
    return path


def in_short(facts: Result) -> str:
    """The lab's test of itself in one line."""
    (supported, effects), (called, nulls) = facts["counts"]["effects"], facts["counts"]["nulls"]
    return f"finds {supported} of {effects} known effects, and a difference in {called} of {nulls} cases where there is none"


def shown(facts: Result) -> Group:
    """What was found, for the terminal."""
    made = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("comparison", "difference (interval)", "seeds", "verdict"):
        made.add_column(column)
    for kind in _kinds():
        for one in facts[kind]:
            made.add_row(escape(one["title"]), difference(one), str(one["seeds"]), colored(one["verdict"]))
    lines: list[RenderableType] = [made, "", f"The lab [bold]{in_short(facts)}[/bold]."]
    return Group(*lines)
