"""What a sweep found, as `sweep.json` holds it: every variant's numbers over its seeds, its search, and what stopped its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from luthier.lab.runner import Choice
from luthier.lab.verdict import t_interval
from luthier.report.facts import Facts, are_shares
from luthier.report.words import measured
from luthier.sweep.grid import Variant
from luthier.sweep.runs import Job, Outcome, outcome
from luthier.sweep.search import side_of


class Rated(NamedTuple):
    """The learning rate of a variant, and how it came about."""

    choice: Choice
    center: float
    """The rate that the grid lies around."""
    source: str
    """Where that one comes from."""
    search: tuple[Job, ...] = ()
    """The runs of the search, by rate; none where there was no search."""
    added: tuple[float, ...] = ()
    """The rates by which the grid grew, since the best one lay at its end."""
    tuned: bool = True
    """Whether any rate taught something by the set that chooses."""


class Measures(NamedTuple):
    """Which evaluation sets say what."""

    chosen_by: str
    """Chose the learning rates."""
    target: str
    """Shows the new skill."""


def score_of(found: Outcome, name: str) -> float | None:
    """The value of an evaluation set after training, so that larger is better; None where it was not measured."""
    entry = ((found.facts or {}).get("metrics") or {}).get(name) or {}
    value = entry.get("after")
    if not measured(value):
        return None
    return value if entry.get("higher_is_better", True) else -value


def floor_of(found: Outcome, name: str) -> float | None:
    """The score of the model before training, larger is better, by an evaluation set; None where it was not measured."""
    entry = ((found.facts or {}).get("metrics") or {}).get(name) or {}
    value = entry.get("before")
    if not measured(value):
        return None
    return value if entry.get("higher_is_better", True) else -value


def loss_of(found: Outcome, chosen_by: str) -> float | None:
    """What decides between rates of equal score: the loss or perplexity of the first other target; None where none was measured."""
    for name, entry in ((found.facts or {}).get("metrics") or {}).items():
        if name != chosen_by and entry.get("role") == "target" and entry.get("metric") in ("loss", "perplexity"):
            value = entry.get("after")
            return value if measured(value) else None
    return None


def forgotten(facts: Facts) -> float | None:
    """The share of the kept sets' items that were right before and no longer are; None where none were right before."""
    kept = facts.get("retained")
    return None if kept is None else 1 - kept


def seconds_per_step(facts: Facts) -> float | None:
    """Seconds of training for one optimizer step, the mean over the run."""
    return facts["seconds"] / facts["steps"] if facts.get("seconds") and facts.get("steps") else None


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """A number over the seeds.

    Returns:
        `values` by seed, None where a run has no number; their `mean`; `interval`, 95 % of the mean by Student's t, None for
        fewer than two; `low` and `high`, the smallest and the largest.
    """
    known = [value for value in values if measured(value)]
    interval = t_interval(known)
    return {
        "values": list(values),
        "mean": fmean(known) if known else None,
        "interval": None if interval is None else list(interval),
        "low": min(known, default=None),
        "high": max(known, default=None),
    }


def variant_facts(variant: Variant, rated: Rated, measures: Measures, runs: Sequence[Job]) -> dict[str, Any]:
    """One variant: its rate and search, its runs, and each number over them."""
    found = [outcome(job) for job in runs]
    facts = [one.facts or {} for one in found]
    sets = dict.fromkeys(name for one in facts for name in one.get("metrics") or {})
    return {
        "name": variant.name,
        "changes": dict(variant.changes),
        "learning_rate": rated.choice.rate,
        "learning_rate_center": rated.center,
        "learning_rate_source": rated.source,
        "learning_rate_note": rated.choice.note,
        "learning_rate_side": side_of(rated.choice),
        "learning_rates_added": list(rated.added),
        "tuned": rated.tuned,
        "search": [_tried(job, measures.chosen_by) for job in rated.search],
        "runs": [_run(job, one) for job, one in zip(runs, found, strict=True)],
        "target": summary([_after(one, measures.target) for one in facts]),
        "forgetting": summary([forgotten(one) for one in facts]),
        "trained_parameters": summary([one.get("trained_parameters") for one in facts]),
        "peak_memory_bytes": summary([one.get("peak_memory_bytes") for one in facts]),
        "seconds_per_step": summary([seconds_per_step(one) for one in facts]),
        "sets": {name: summary([_after(one, name) for one in facts]) for name in sets},
    }


def set_facts(finished: Sequence[Facts]) -> dict[str, dict[str, Any]]:
    """Each evaluation set: its metric, side, items, and whether values are shares; `before` where all runs began alike, else None."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for one in finished for name in one.get("metrics") or {}):
        entries = [entry for one in finished if (entry := (one.get("metrics") or {}).get(name))]
        first, higher = entries[0], bool(entries[0].get("higher_is_better", True))
        before = [entry.get("before") for entry in entries]
        values = [*before, *(entry.get("after") for entry in entries)]
        found[name] = {
            **{key: first.get(key) for key in ("metric", "role", "n")},
            "before": before[0] if _same(before) else None,
            "higher_is_better": higher,
            "is_share": are_shares(values, higher),
        }
    return found


def _after(facts: Facts, name: str) -> float | None:
    value = ((facts.get("metrics") or {}).get(name) or {}).get("after")
    return value if measured(value) else None


def _same(values: Sequence[Any]) -> bool:
    # Runs that compute with other numbers of threads round otherwise.
    return all(measured(value) and math.isclose(value, values[0], rel_tol=1e-3) for value in values)


def _tried(job: Job, chosen_by: str) -> dict[str, Any]:
    found = outcome(job)
    return {"learning_rate": job.rate, "value": _after(found.facts or {}, chosen_by), **_run(job, found)}


def _run(job: Job, found: Outcome) -> dict[str, Any]:
    return {"seed": job.seed, "run": str(job.folder.relative_to(Path(job.root))), "error": found.error}
