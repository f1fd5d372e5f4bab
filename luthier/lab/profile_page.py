"""A skill profile as people see it: a table in the terminal, and a page with the radar chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from luthier.lab.profile import headline
from luthier.report.facts import SetFacts, sets_of
from luthier.report.html import render_page, write_page
from luthier.report.radar import axes_of, radar_figure
from luthier.report.terminal import plain
from luthier.report.words import NOT_MEASURED, measured, spaced

SHOWN_ITEMS = 4
"""Answers of a skill that a page shows."""


class Line(NamedTuple):
    """One skill of a profile."""

    name: str
    meaning: str
    taught: bool
    set: SetFacts
    items: tuple[Mapping[str, Any], ...]
    """The first answers, wrong ones first; none where likelihoods are measured."""


def lines_of(facts: Mapping[str, Any]) -> list[Line]:
    """The skills of what `luthier.lab.profile.profile` returned, in their order."""
    return [
        Line(one.name, entry["meaning"], entry["taught"], one, _chosen(entry["items"]))
        for one, entry in zip(sets_of({"metrics": facts["skills"]}), facts["skills"].values(), strict=True)
    ]


def profile_page(facts: Mapping[str, Any]) -> str:
    """A profile as one self-contained page."""
    lines = lines_of(facts)
    figure = radar_figure(axes_of([line.set for line in lines]))
    return render_page("profile.html.j2", facts=facts, lines=lines, radar=figure, headline=headline(facts))


def write_profile(facts: Mapping[str, Any], path: Path) -> Path:
    """Write a profile's page; a file that exists is replaced."""
    return write_page(path, profile_page(facts))


def profile_table(facts: Mapping[str, Any]) -> Table:
    """A profile in the terminal: each skill's value, and of a run also what it was before."""
    compares = facts["compares"]
    values = {"before": "right", "after": "right", "difference": "right", "verdict": "left"}
    columns = values if compares else {"metric": "left", "value": "right", "95 % interval": "left"}
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=headline(facts), title_justify="left", expand=True)
    table.add_column("skill", no_wrap=True)
    table.add_column("meaning", style="dim", overflow="ellipsis", no_wrap=True, ratio=1)
    for name, side in columns.items():
        table.add_column(name, no_wrap=True, justify="right" if side == "right" else "left")
    table.add_column("taught", no_wrap=True)
    for line in lines_of(facts):
        cells = _compared(line.set) if compares else _measured(line.set)
        table.add_row(plain(line.name, "bold"), plain(line.meaning), *map(plain, cells), plain("yes" if line.taught else "no"))
    return table


def _compared(one: SetFacts) -> list[str]:
    return [one.value(one.before.value), one.value(one.after.value), one.difference_words(), one.verdict]


def _measured(one: SetFacts) -> list[str]:
    return [spaced(one.metric), one.value(one.after.value), one.after.interval(one.form) or NOT_MEASURED]


def _chosen(items: Any) -> tuple[Mapping[str, Any], ...]:
    answered = [item for item in items if item["expected"] and measured(item["after_score"])]
    return tuple(sorted(answered, key=lambda item: item["after_score"])[:SHOWN_ITEMS])
