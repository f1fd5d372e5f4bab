"""Runs side by side: what differs in their recipes, what came of it, what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from luthier.errors import LuthierError
from luthier.recipe import flat as flat_recipe
from luthier.report.facts import Facts, SetFacts, sets_of, short_name
from luthier.report.figures import Range, range_of
from luthier.report.html import render_page, write_page
from luthier.report.terminal import plain
from luthier.report.words import NOT_MEASURED, count, duration, measured, number, percent, shown, size, spaced

NOT_SET = "not set"
OWN_KEYS = ("name", "out", "baseline_run")
"""Keys of a recipe that say where a run lies and what it is compared with, not what it does."""

COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "retained": ("Retained", percent),
    "trained_parameters": ("Trained parameters", count),
    "seconds": ("Training time", duration),
    "supervised_tokens": ("Supervised tokens", count),
    "supervised_tokens_per_second": ("Supervised tokens a second", number),
    "peak_memory_bytes": ("Peak memory", size),
    "final_loss": ("Final loss", number),
}


class SetComparison(NamedTuple):
    """One evaluation set over all runs."""

    name: str
    metric: str
    sets: tuple[SetFacts | None, ...]
    """None for a run that did not have the set."""
    why_not: str
    """Why the runs must not be ranked by it; empty where they may."""
    ahead: int | None
    """The run whose interval lies wholly beyond those of all others; None where there is none."""

    def words(self, index: int) -> str:
        """A run's value after training, with what it was before."""
        one = self.sets[index]
        if one is None:
            return NOT_MEASURED
        ahead = ", ahead" if index == self.ahead else ""
        return f"{one.value(one.after.value)} ({one.value(one.before.value)} before){ahead}"

    @property
    def span(self) -> Range:
        """One range for the figures of all runs, so that they can be compared by eye."""
        return range_of([one for one in self.sets if one is not None])

    @property
    def verdict(self) -> str:
        """What can be said of the runs together; empty where one is ahead."""
        if self.why_not:
            return f"not comparable: {self.why_not}"
        return "" if self.ahead is not None else "no clear difference"


class Difference(NamedTuple):
    """One line that is not the same in all runs."""

    name: str
    values: tuple[str, ...]


def compared(runs: Sequence[Facts]) -> dict[str, Any]:
    """The comparison for scripts.

    Returns:
        `runs` their names; `recipe` the keys that differ, with each run's value, None where not set; `metrics` by set:
        whether comparable, why not, values before and after, intervals, and the run that is `ahead`; `cost` by fact.

    Raises:
        LuthierError: fewer than two runs.
    """
    names = _names(runs)
    return {
        "runs": names,
        "recipe": {key: list(values) for key, values in _recipe_values(runs).items()},
        "metrics": {
            one.name: {
                "comparable": not one.why_not,
                "why_not": one.why_not,
                "metric": one.metric,
                "before": [None if found is None else found.before.value for found in one.sets],
                "after": [None if found is None else found.after.value for found in one.sets],
                "after_interval": [None if found is None else [found.after.low, found.after.high] for found in one.sets],
                "ahead": None if one.ahead is None else names[one.ahead],
            }
            for one in set_comparisons(runs)
        },
        "cost": {key: [run.get(key) for run in runs] for key in COSTS},
    }


def compare_runs(runs: Sequence[Facts]) -> Table:
    """The comparison in the terminal.

    Raises:
        LuthierError: fewer than two runs.
    """
    names = _names(runs)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(plain(name), overflow="fold")
    for one in set_comparisons(runs):
        cells = [plain(one.words(i), "bold" if one.ahead == i else "") for i in range(len(runs))]
        table.add_row(plain(f"{one.name}, {spaced(one.metric)}"), *cells)
        if one.verdict:
            table.add_row(Text(""), plain(one.verdict, "yellow" if one.why_not else "dim"))
    table.add_section()
    for line in [*cost_lines(runs), *recipe_lines(runs)]:
        table.add_row(plain(line.name, "dim"), *map(plain, line.values))
    return table


def write_comparison(runs: Sequence[Facts], path: Path) -> Path:
    """Write the comparison as one self-contained HTML page.

    Args:
        runs: what the `run.json` of each holds.
        path: the file to write; one that exists is replaced.

    Returns:
        The path.

    Raises:
        LuthierError: fewer than two runs.
    """
    names = _names(runs)
    page = render_page(
        "comparison.html.j2",
        names=names,
        runs=runs,
        comparisons=set_comparisons(runs),
        costs=cost_lines(runs),
        differences=recipe_lines(runs),
    )
    return write_page(path, page)


def set_comparisons(runs: Sequence[Facts]) -> list[SetComparison]:
    """Every evaluation set that any run has."""
    by_name = [{one.name: one for one in sets_of(run)} for run in runs]
    return [
        _compare_set(name, runs, [found.get(name) for found in by_name]) for name in dict.fromkeys(n for f in by_name for n in f)
    ]


def recipe_lines(runs: Sequence[Facts]) -> list[Difference]:
    """The recipe keys that differ."""
    return [
        Difference(key, tuple(NOT_SET if value is None else _as_text(value) for value in values))
        for key, values in _recipe_values(runs).items()
    ]


def cost_lines(runs: Sequence[Facts]) -> list[Difference]:
    """What each run kept, trained, took and needed."""
    return [Difference(title, tuple(shown(run.get(key), form) for run in runs)) for key, (title, form) in COSTS.items()]


def _names(runs: Sequence[Facts]) -> list[str]:
    if len(runs) < 2:
        raise LuthierError("a comparison needs two runs", where="compare", fix="name two or more; see `luthier runs`")
    return [short_name(run) for run in runs]


def _compare_set(name: str, runs: Sequence[Facts], sets: list[SetFacts | None]) -> SetComparison:
    metric = next(one.metric for one in sets if one is not None)
    why_not = _why_not(name, runs, sets)
    return SetComparison(name, metric, tuple(sets), why_not, None if why_not else _ahead(name, runs, sets))


def _why_not(name: str, runs: Sequence[Facts], sets: Sequence[SetFacts | None]) -> str:
    """Why runs must not be ranked by a set; empty where they may be."""
    if any(one is None or not measured(one.after.value) for one in sets):
        return "not every run measured it"
    entries = [run["metrics"][name] for run in runs]
    if len({entry.get("metric") for entry in entries}) > 1:
        return "the metrics differ"
    if not all(entry.get("items") for entry in entries):
        return "its items were not recorded"
    if len({_identity(entry["items"]) for entry in entries}) > 1:
        return "its items differ"
    recipes = [((run.get("recipe") or {}).get("evaluate") or {}).get(name) or {} for run in runs]
    if len({recipe.get("max_new_tokens") for recipe in recipes}) > 1:
        return "the longest answers allowed differ"
    return ""


def _identity(items: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(sorted(_as_text([item.get(key) for key in ("id", "prompt", "expected")]) for item in items))


def _ahead(name: str, runs: Sequence[Facts], sets: Sequence[SetFacts | None]) -> int | None:
    sign = 1 if runs[0]["metrics"][name].get("higher_is_better", True) else -1
    ends = [
        sorted((sign * one.after.low, sign * one.after.high))
        for one in sets
        if one and measured(one.after.low) and measured(one.after.high)
    ]
    if len(ends) < len(sets):
        return None
    best = max(range(len(ends)), key=lambda index: ends[index][0])
    return best if all(ends[best][0] > high for index, (_, high) in enumerate(ends) if index != best) else None


def _recipe_values(runs: Sequence[Facts]) -> dict[str, tuple[Any, ...]]:
    # An empty mapping beside one with keys says no more than these.
    flat = [{key: value for key, value in flat_recipe(run.get("recipe") or {}).items() if value != {}} for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in OWN_KEYS]
    values = {key: tuple(one.get(key) for one in flat) for key in keys}
    return {key: found for key, found in values.items() if len({_as_text(value) for value in found}) > 1}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
