"""The page of a sweep, from what `sweep.json` holds: every number on it stands there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from luthier.report.html import render_page, write_page
from luthier.report.terminal import plain
from luthier.report.words import NOT_MEASURED, between, count, duration, measured, number, percent, plural, shown, size, spaced
from luthier.sweep.figure import Point, tradeoff_figure

Facts = Mapping[str, Any]
Form = Callable[[float], str]


def step_time(seconds: float) -> str:
    """A step's time, in milliseconds below a second."""
    return f"{number(1000 * seconds)}\u00a0ms" if seconds < 1 else duration(seconds)


COSTS: Mapping[str, tuple[str, Form]] = {
    "trained_parameters": ("Trained parameters", count),
    "peak_memory_bytes": ("Peak memory", size),
    "seconds_per_step": ("Time a step", step_time),
}


class Cell(NamedTuple):
    """A number over the seeds, in words."""

    mean: str
    interval: str
    """95 % of the mean, of a cost the smallest and the largest; empty where there is none."""
    seeds: str
    """Every seed's value, or what they all are; empty for a single one."""


class Line(NamedTuple):
    """One variant in the table."""

    name: str
    tuned: bool
    rate: str
    finished: str
    target: Cell
    forgetting: Cell
    costs: tuple[Cell, ...]
    sets: tuple[Cell, ...]


class Trial(NamedTuple):
    """One learning rate of a variant's search."""

    rate: str
    value: str
    chosen: bool
    error: str


class Searched(NamedTuple):
    """The search of one variant."""

    name: str
    trials: tuple[Trial, ...]
    note: str
    source: str


class Failure(NamedTuple):
    """A run that gave no result."""

    variant: str
    rate: str
    seed: int
    what: str
    where: str
    fix: str


def write_sweep(facts: Facts, path: Path) -> Path:
    """Write a sweep's page; a file that exists is replaced."""
    return write_page(path, sweep_page(facts))


def sweep_page(facts: Facts) -> str:
    """A sweep as one self-contained page."""
    form = set_form(facts, facts["target"])
    points = [
        Point(
            variant["name"],
            variant["target"]["values"],
            variant["forgetting"]["values"],
            variant["target"]["mean"],
            variant["forgetting"]["mean"],
            variant["tuned"],
        )
        for variant in facts["variants"]
    ]
    return render_page(
        "sweep.html.j2",
        facts=facts,
        headline=headline(facts),
        warned=[(one["warning"], one["who"]) for one in facts["warnings"]],
        figure=tradeoff_figure(
            points, f"{facts['target']}, after training", form, base=facts["sets"].get(facts["target"], {}).get("before")
        ),
        cost_names=[title for title, _ in COSTS.values()],
        lines=lines_of(facts),
        before={name: shown(one["before"], set_form(facts, name)) for name, one in facts["sets"].items()},
        searches=searches_of(facts),
        failures=failures_of(facts),
    )


def headline(facts: Facts) -> str:
    """What was compared, in one sentence."""
    keys = ", ".join(facts["keys"])
    seeds = plural(len(facts["seeds"]), "seed")
    variants = plural(len(facts["variants"]), "variant")
    return f"{variants}{f' of {keys}' if keys else ''}, {seeds} each."


def lines_of(facts: Facts) -> list[Line]:
    """The variants in their order."""
    return [_line(facts, variant) for variant in facts["variants"]]


def searches_of(facts: Facts) -> list[Searched]:
    """The searches, of the variants that had one."""
    form = set_form(facts, facts["chosen_by"])
    return [_searched(variant, form) for variant in facts["variants"] if variant["search"]]


def failures_of(facts: Facts) -> list[Failure]:
    """All runs that gave no result, those of the searches first."""
    return [
        Failure(
            variant["name"],
            rate_words(run.get("learning_rate", variant["learning_rate"])),
            run["seed"],
            *(run["error"][key] for key in _ERROR),
        )
        for variant in facts["variants"]
        for run in [*variant["search"], *variant["runs"]]
        if run["error"]
    ]


_ERROR = ("error", "where", "fix")


def sweep_summary(facts: Facts) -> Group:
    """A sweep in the terminal: its answer, then its table."""
    answer = facts["answer"]
    warned = [plain(f"warning: {one['warning']} ({one['who']})", "yellow") for one in facts["warnings"]]
    notes = [plain(note, "dim") for note in answer["notes"]]
    return Group(plain(answer["sentence"], "bold"), *notes, *warned, Text(""), sweep_table(facts))


def sweep_table(facts: Facts) -> Table:
    """The variants of a sweep in the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title=plain(headline(facts)), title_justify="left")
    for column in (
        "variant",
        "learning rate",
        facts["target"],
        "forgotten",
        *(title.lower() for title, _ in COSTS.values()),
        "runs",
    ):
        table.add_column(plain(column))
    for line in lines_of(facts):
        cells = [line.target, line.forgetting, *line.costs]
        name = line.name if line.tuned else f"{line.name} (not tuned)"
        table.add_row(
            plain(name, "bold" if line.tuned else "dim"),
            plain(line.rate),
            *(plain(cell.mean) for cell in cells),
            plain(line.finished),
        )
    for one in failures_of(facts):
        table.add_row(plain(one.variant, "red"), plain(one.rate), plain(f"seed {one.seed}: {one.what}", "red"))
    return table


def set_form(facts: Facts, name: str) -> Form:
    """How the values of an evaluation set read."""
    return percent if facts["sets"].get(name, {}).get("is_share") else number


def rate_words(rate: float | None) -> str:
    """A learning rate, as recipes write it."""
    return "none" if rate is None else f"{rate:g}"


def cell_of(over_seeds: Facts, form: Form) -> Cell:
    """A number over the seeds in words."""
    low, high = over_seeds["interval"] or (None, None)
    values: Sequence[float | None] = over_seeds["values"]
    texts = [shown(value, form) for value in values]
    same = len(set(texts)) == 1
    seeds = "" if len(values) < 2 else f"all {texts[0]}" if same else ", ".join(texts)
    return Cell(shown(over_seeds["mean"], form), _interval(low, high, over_seeds, form), seeds)


def cost_cell(over_seeds: Facts, form: Form) -> Cell:
    """A cost over the seeds: its mean, with the smallest and the largest where they differ."""
    low, high = over_seeds["low"], over_seeds["high"]
    spread = between(low, high, form) if measured(low) and measured(high) and form(low) != form(high) else ""
    return Cell(shown(over_seeds["mean"], form), spread, "")


def _interval(low: float | None, high: float | None, over_seeds: Facts, form: Form) -> str:
    """Empty for seeds that agree exactly: an interval without width would claim more than they know."""
    if not measured(low) or not measured(high) or low == high:
        return ""
    # Student's t knows nothing of the ends of a scale: no share is above 100 %, and what was never below 0 cannot be.
    low = max(low, 0.0) if over_seeds["low"] >= 0 else low
    return between(low, min(high, 1.0) if form is percent else high, form)


def _line(facts: Facts, variant: Facts) -> Line:
    finished = sum(run["error"] is None for run in variant["runs"])
    absent: Facts = {"values": [], "mean": None, "interval": None}
    return Line(
        name=variant["name"],
        tuned=variant["tuned"],
        rate=rate_words(variant["learning_rate"]),
        finished=f"{finished} of {len(facts['seeds'])}",
        target=cell_of(variant["target"], set_form(facts, facts["target"])),
        forgetting=cell_of(variant["forgetting"], percent),
        costs=tuple(cost_cell(variant[key], form) for key, (_, form) in COSTS.items()),
        sets=tuple(cell_of(variant["sets"].get(name, absent), set_form(facts, name)) for name in facts["sets"]),
    )


def _searched(variant: Facts, form: Form) -> Searched:
    trials = tuple(
        Trial(
            rate_words(one["learning_rate"]),
            NOT_MEASURED if not measured(one["value"]) else form(one["value"]),
            one["learning_rate"] == variant["learning_rate"],
            one["error"]["error"] if one["error"] else "",
        )
        for one in variant["search"]
    )
    source = f"around {rate_words(variant['learning_rate_center'])}, {spaced(variant['learning_rate_source'])}"
    added = [rate_words(rate) for rate in variant["learning_rates_added"]]
    said = [f"{' and '.join(added)} added beyond its end"] if added else []
    said += [variant["learning_rate_note"]] if variant["learning_rate_note"] else []
    said += [] if variant["tuned"] else ["not tuned: no learning rate taught anything"]
    return Searched(variant["name"], trials, "; ".join(said), source)
