"""Runs side by side: what differs in their recipes, what came of it, what it cost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from rich.console import Group
from rich.table import Table
from rich.text import Text

from luthier.errors import LuthierError
from luthier.evaluate.paired import BETTER, NO_CHANGE, UNCLEAR
from luthier.recipe import flat as flat_recipe
from luthier.report.beside import Answers, Versus, aligned, answers_of, identity, versus
from luthier.report.facts import Facts, SetFacts, sets_of, short_name
from luthier.report.figures import Range, range_of
from luthier.report.html import render_page, write_page
from luthier.report.overlay import overlay_figure
from luthier.report.story import gathered
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
    versus: tuple[Versus, ...] = ()
    """Every run but the first beside the first, on the same items; empty where they must not be ranked."""
    ahead: int | None = None
    """The run that is better than each other one; None where there is none."""
    answers: tuple[Answers, ...] = ()
    """What the runs answered, those items first at which they differ."""

    def words(self, index: int) -> str:
        """A run's value after training, with what it was before."""
        one = self.sets[index]
        if one is None:
            return NOT_MEASURED
        beside = f", {self.beside(index)}" if self.beside(index) else ""
        return f"{one.value(one.after.value)} ({one.value(one.before.value)} before){beside}"

    def beside(self, index: int) -> str:
        """A run beside the first one in words; empty for the first, and where they must not be ranked."""
        first = self.sets[0]
        if not index or not self.versus or first is None:
            return ""
        found = self.versus[index - 1]
        return f"{shown(found.difference.value, first.difference_form)}: {found.verdict}"

    @property
    def span(self) -> Range:
        """One range for the figures of all runs, so that they can be compared by eye."""
        return range_of([one for one in self.sets if one is not None])

    @property
    def verdict(self) -> str:
        """What can be said of the runs together; empty where one is better than the others."""
        if self.why_not:
            return f"not comparable: {self.why_not}"
        if self.ahead is not None:
            return ""
        said = {one.verdict for one in self.versus}
        return said.pop() if len(said) == 1 and said <= {NO_CHANGE, NOT_MEASURED} else UNCLEAR


class Difference(NamedTuple):
    """One line that is not the same in all runs."""

    name: str
    values: tuple[str, ...]


def compared(runs: Sequence[Facts]) -> dict[str, Any]:
    """The comparison for scripts.

    Returns:
        `sentence`; `runs` their names; `warnings`, each once with the runs that say it; `recipe` the keys that differ, with each run's
        value, None where not set; `metrics` by set: whether comparable, why not, values before and after, intervals, `versus` the first run
        (every other's difference, interval, p-value and verdict), and the run that is `ahead`; `cost` by fact.

    Raises:
        LuthierError: fewer than two runs.
    """
    names = _names(runs)
    sets = set_comparisons(runs)
    return {
        "sentence": sentence(names, sets),
        "runs": names,
        "warnings": [{"warning": one.text, "runs": list(one.runs)} for one in gathered(_by_name(runs))],
        "recipe": {key: list(values) for key, values in _recipe_values(runs).items()},
        "metrics": {
            one.name: {
                "comparable": not one.why_not,
                "why_not": one.why_not,
                "metric": one.metric,
                "before": [None if found is None else found.before.value for found in one.sets],
                "after": [None if found is None else found.after.value for found in one.sets],
                "after_interval": [None if found is None else [found.after.low, found.after.high] for found in one.sets],
                "versus": {name: found.as_json() for name, found in zip(names[1:], one.versus, strict=False)},
                "ahead": None if one.ahead is None else names[one.ahead],
                "verdict": one.verdict,
            }
            for one in sets
        },
        "cost": {key: [run.get(key) for run in runs] for key in COSTS},
    }


def sentence(names: Sequence[str], sets: Sequence[SetComparison]) -> str:
    """What the sets say of the runs, in one sentence: targets first."""
    said: dict[str, list[str]] = {}
    for one in sorted(sets, key=lambda one: next(found.role for found in one.sets if found is not None) == "retention"):
        words = "not comparable" if one.why_not else one.verdict or f"{names[one.ahead or 0]} is better"
        said.setdefault(words, []).append(one.name)
    parts = [f"{words} on {', '.join(some)}" for words, some in said.items()] or ["nothing was measured that could be compared"]
    text = "; ".join(parts)
    # A run keeps the letter that its name begins with.
    return f"{text if text.startswith(tuple(names)) else text[0].upper() + text[1:]}."


def compare_summary(runs: Sequence[Facts]) -> Group:
    """The comparison in the terminal: a sentence, what the runs warn of, the table.

    Raises:
        LuthierError: fewer than two runs.
    """
    names = _names(runs)
    warned = [plain(f"warning: {one.text} ({one.who})", "yellow") for one in gathered(_by_name(runs))]
    return Group(plain(sentence(names, set_comparisons(runs)), "bold"), *warned, compare_runs(runs))


def compare_runs(runs: Sequence[Facts]) -> Table:
    """The comparison in the terminal as a table.

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


def write_comparison(runs: Sequence[Facts], path: Path, folders: Sequence[Path] = ()) -> Path:
    """Write the comparison as one self-contained HTML page.

    Args:
        runs: what the `run.json` of each holds.
        path: the file to write; one that exists is replaced.
        folders: of the runs, to link their reports; none: no links.

    Returns:
        The path.

    Raises:
        LuthierError: fewer than two runs.
    """
    names = _names(runs)
    comparisons = set_comparisons(runs)
    page = render_page(
        "comparison.html.j2",
        names=names,
        runs=runs,
        sentence=sentence(names, comparisons),
        warned=[(one.text, one.who) for one in gathered(_by_name(runs))],
        links=[link_to(folder / "report.html", path) for folder in folders],
        curves=overlay_figure(_by_name(runs)),
        comparisons=comparisons,
        costs=cost_lines(runs),
        differences=recipe_lines(runs),
    )
    return write_page(path, page)


def link_to(file: Path, page: Path) -> str:
    """Where a page finds a file, as a link that is relative to the page: escaped, so that no name of a folder becomes a scheme."""
    return quote(os.path.relpath(file, Path(page).parent))


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


def _by_name(runs: Sequence[Facts]) -> dict[str, Facts]:
    """The runs by their names; a second one of a name gets a number."""
    named: dict[str, Facts] = {}
    for name, run in zip(_names(runs), runs, strict=True):
        named[name if name not in named else f"{name} ({len(named) + 1})"] = run
    return named


def _compare_set(name: str, runs: Sequence[Facts], sets: list[SetFacts | None]) -> SetComparison:
    metric = next(one.metric for one in sets if one is not None)
    why_not = _why_not(name, runs, sets)
    items = None if why_not else aligned([run["metrics"][name] for run in runs])
    if items is None:
        return SetComparison(name, metric, tuple(sets), why_not or "too little of its items was recorded")
    noises = [noise for run in runs if measured(noise := (run.get("repeat_baseline") or {}).get(name))]
    noise = max(noises, default=None)
    sign = 1 if runs[0]["metrics"][name].get("higher_is_better", True) else -1
    beside = tuple(versus(metric, items[0], one, noise, sign > 0) for one in items[1:])
    best = max(range(len(items)), key=lambda place: sign * runs[place]["metrics"][name]["after"])
    others = [place for place in range(len(items)) if place != best]
    ahead = all(versus(metric, items[place], items[best], noise, sign > 0).verdict == BETTER for place in others)
    return SetComparison(name, metric, tuple(sets), "", beside, best if ahead else None, tuple(answers_of(name, items)))


def _why_not(name: str, runs: Sequence[Facts], sets: Sequence[SetFacts | None]) -> str:
    """Why runs must not be ranked by a set; empty where they may be."""
    if any(one is None or not measured(one.after.value) for one in sets):
        return "not every run measured it"
    entries = [run["metrics"][name] for run in runs]
    if len({entry.get("metric") for entry in entries}) > 1:
        return "the metrics differ"
    if not all(entry.get("items") for entry in entries):
        return "its items were not recorded"
    if len({tuple(sorted(map(identity, entry["items"]))) for entry in entries}) > 1:
        return "its items differ"
    recipes = [((run.get("recipe") or {}).get("evaluate") or {}).get(name) or {} for run in runs]
    if len({recipe.get("max_new_tokens") for recipe in recipes}) > 1:
        return "the longest answers allowed differ"
    return ""


def _recipe_values(runs: Sequence[Facts]) -> dict[str, tuple[Any, ...]]:
    # An empty mapping beside one with keys says no more than these.
    flat = [{key: value for key, value in flat_recipe(run.get("recipe") or {}).items() if value != {}} for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in OWN_KEYS]
    values = {key: tuple(one.get(key) for one in flat) for key in keys}
    return {key: found for key, found in values.items() if len({_as_text(value) for value in found}) > 1}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
