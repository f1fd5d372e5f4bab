"""Lists of techniques and papers, for the command line and the docs."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from luthier import registry
from luthier.errors import LuthierError
from luthier.registry.listing import VERDICTS, Line, grouped, known, lines
from luthier.registry.papers import papers

NOT_MEASURED = "not measured"
"""The verdict of a replication that no experiment has tested yet."""


def as_rows(kind: str | None = None) -> list[dict[str, Any]]:
    """Every technique's card and verdict.

    Raises:
        LuthierError: there is no such kind.
    """
    kinds = tuple(registry.KINDS) if kind is None else (kind,)
    return [{**card.as_json(), "verdict": verdict(card.replication)} for card in registry.cards(kinds)]


def verdict(replication: str) -> str:
    """What came of a replication, in words."""
    found: dict[str, dict[str, Any]] = json.loads(VERDICTS.read_text(encoding="utf-8"))
    return str(found[replication]["words"]) if replication in found else NOT_MEASURED


def _with_columns(*columns: str) -> Table:
    shown = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        shown.add_column(column)
    return shown


def table(rows: Sequence[Line], width: int, *, start: bool = False, ordered: bool = False) -> Text:
    """Techniques by what people want of them, as `grouped`."""
    if not rows:
        return Text("There is no technique of this kind yet: docs/adding-a-technique.md tells how one is added.")
    return grouped(rows, width, start=start, ordered=ordered)


_LABELS = {
    "title": "title",
    "key": "key",
    "kind": "kind",
    "paper": "paper",
    "row": "number",
    "step0": "at the first step",
    "merges": "merging",
    "reduces_to": "special case",
    "departs": "differs from the paper",
    "learning_rate": "learning rate",
}
"""What the facts of a card are called."""


def one_technique(name: str, claim: Callable[[str], str] = str) -> tuple[dict[str, Any], Group]:
    """One technique whole: its card and its options. Papers write names in capitals and with hyphens; both find it.

    Args:
        name: of the technique.
        claim: says what a replication of some name is about: a verdict is one of a claim, and never of the technique.

    Raises:
        LuthierError: there is no such technique.
    """
    name = known(name)
    found = registry.find(name)
    schema = registry.options_model(found.factory, name).model_json_schema()
    said, meanings = described(found.factory)
    options = {key: {**option, "meaning": meanings.get(key, "")} for key, option in schema.get("properties", {}).items()}
    facts = {**found.card.as_json(), "verdict": verdict(found.card.replication), "options": options}
    card = Table.grid(padding=(0, 2))
    for key, label in _LABELS.items():
        if facts[key] not in ("", None):
            card.add_row(f"[bold]{label}[/bold]", escape(str(facts[key])))
    if found.card.replication:
        about = claim(found.card.replication)
        card.add_row("[bold]replication[/bold]", escape(f"{about} (luthier replicate {found.card.replication})"))
        card.add_row("[bold]verdict[/bold]", escape(f"on this claim: {facts['verdict']}"))
    shown = _with_columns("option", "default", "meaning")
    for key, option in options.items():
        default = json.dumps(option["default"]) if "default" in option else "required"
        meaning = " ".join(one for one in (option["meaning"], f"[{_type(option)}]") if one not in ("", "[]"))
        shown.add_row(key, escape(default), escape(meaning))
    parts: list[RenderableType] = [Text(name, style="bold"), Text(said), Text(), card]
    if options:
        parts += [Text(), shown]
    return facts, Group(*parts)


def described(factory: Any) -> tuple[str, dict[str, str]]:
    """A technique's docstring without its lists, and what it says of each option."""
    text, _, arguments = (inspect.getdoc(factory) or "").partition("\nArgs:\n")
    text = re.split(r"\n(?=(?:Raises|Returns):\n)", text)[0]
    meanings: dict[str, str] = {}
    name = ""
    for line in arguments.splitlines():
        if line and not line.startswith(" "):
            break
        if option := re.fullmatch(r" {4}(\w+): ?(.*)", line):
            name, meanings[option[1]] = option[1], option[2]
        elif name and line.strip():
            meanings[name] += f" {line.strip()}"
    return text.strip(), meanings


def _type(option: dict[str, Any]) -> str:
    if "enum" in option:
        return " | ".join(map(str, option["enum"]))
    if "anyOf" in option:
        return " | ".join(_type(one) for one in option["anyOf"])
    return str(option.get("type", ""))


def paper_rows(
    area: str | None = None,
    done: bool = False,
    replications: Mapping[int, Sequence[str]] | None = None,
    recipes: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """The papers, each with the techniques that stand for it; an arXiv number only where a technique's author checked it.

    Args:
        area: only areas that contain it.
        done: only papers that something stands for.
        replications: their names, by the paper's number.
        recipes: the names of recipes that use a technique, by the technique.

    Raises:
        LuthierError: no area contains these words.
    """
    areas = sorted({paper.area for paper in papers()})
    if area and not any(area.lower() in one.lower() for one in areas):
        raise LuthierError(f"no area of the papers contains `{area}`", where="--area", fix=f"areas: {'; '.join(areas)}")
    standing: dict[int, list[Line]] = {}
    for line in lines():
        if line.row is not None:
            standing.setdefault(line.row, []).append(line)
    rows = []
    for paper in papers():
        stand = standing.get(paper.row, [])
        again = list((replications or {}).get(paper.row, ()))
        if (area and area.lower() not in paper.area.lower()) or (done and not stand and not again):
            continue
        used = sorted({recipe for line in stand for recipe in (recipes or {}).get(line.name, ())})
        rows.append(
            {
                "number": paper.row,
                "title": paper.title,
                "area": paper.area,
                "kind": paper.kind,
                "techniques": [line.name for line in stand],
                "paper": stand[0].paper if stand else "",
                "replications": again,
                "recipes": used,
            }
        )
    return rows


def paper_table(rows: list[dict[str, Any]], width: int) -> Text:
    """Papers by area, one line each, and below it what stands for it."""
    if not rows:
        return Text("No paper of this area has a technique yet.")
    text = Text()
    area = None
    for row in sorted(rows, key=lambda row: (row["area"], row["number"])):
        if row["area"] != area:
            area = row["area"]
            text.append(f"{area}\n", style="bold")
        text.append(f"{row['number']:>5}  {shorten(row['title'], max(width - 7, 10), placeholder='…', break_on_hyphens=False)}\n")
        held = [f"{key}: {', '.join(row[key])}" for key in ("techniques", "replications", "recipes") if row[key]]
        for line in textwrap.wrap("; ".join([*held, *([row["paper"]] if row["paper"] else [])]), max(width - 7, 10)):
            text.append(f"       {line}\n", style="cyan")
    text.rstrip()
    return text
