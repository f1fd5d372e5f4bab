"""Lists of techniques and papers, for the command line and the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from luthier import registry
from luthier.errors import LuthierError
from luthier.registry.papers import papers

NOT_MEASURED = "not measured"
"""The verdict of a replication that no experiment has tested yet."""
VERDICTS = Path(__file__).parent / "verdicts.json"
"""What came of the replications that were run, by replication, with the size of the effect; `luthier.lab.verdicts` writes it."""


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


def table(rows: list[dict[str, Any]]) -> RenderableType:
    """Techniques by kind."""
    if not rows:
        return Text("There is no technique of this kind yet: docs/adding-a-technique.md tells how one is added.")
    shown = _with_columns("technique", "kind", "what it does", "paper", "replication")
    for row in rows:
        shown.add_row(
            f"[bold]{escape(row['name'])}[/bold]",
            row["kind"],
            escape(row["summary"]),
            escape(row["paper"]),
            row["verdict"],
        )
    return shown


def one_technique(name: str) -> tuple[dict[str, Any], Group]:
    """One technique whole: its card and its options. Papers write names in capitals and with hyphens; both find it.

    Raises:
        LuthierError: there is no such technique.
    """
    known = {other for kind in registry.KINDS for other in registry.names(kind)}
    name = next((one for one in (name, name.lower().replace("-", "_")) if one in known), name)
    found = registry.find(name)
    schema = registry.options_model(found.factory, name).model_json_schema()
    facts = {**found.card.as_json(), "verdict": verdict(found.card.replication), "options": schema.get("properties", {})}
    card = Table.grid(padding=(0, 2))
    for key in (
        "title",
        "key",
        "kind",
        "paper",
        "row",
        "step0",
        "merges",
        "reduces_to",
        "departs",
        "learning_rate",
        "verdict",
    ):
        if facts[key] not in ("", None):
            card.add_row(f"[bold]{key}[/bold]", escape(str(facts[key])))
    options = _with_columns("option", "default", "type")
    for key, option in facts["options"].items():
        options.add_row(key, escape(json.dumps(option.get("default", "required"))), escape(_type(option)))
    text = Text((found.factory.__doc__ or "").strip())
    return facts, Group(Text(name, style="bold"), text, Text(), card, Text(), options)


def _type(option: dict[str, Any]) -> str:
    if "enum" in option:
        return " | ".join(map(str, option["enum"]))
    if "anyOf" in option:
        return " | ".join(_type(one) for one in option["anyOf"])
    return str(option.get("type", ""))


def paper_rows(area: str | None = None, done: bool = False) -> list[dict[str, Any]]:
    """The papers, each with the techniques that stand for it; an arXiv number only where a technique's author checked it.

    Raises:
        LuthierError: no area contains these words.
    """
    areas = sorted({paper.area for paper in papers()})
    if area and not any(area.lower() in one.lower() for one in areas):
        raise LuthierError(f"no area of the papers contains `{area}`", where="--area", fix=f"areas: {'; '.join(areas)}")
    standing: dict[int, list[registry.Card]] = {}
    for card in registry.cards():
        if card.row is not None:
            standing.setdefault(card.row, []).append(card)
    rows = []
    for paper in papers():
        cards = standing.get(paper.row, [])
        if (area and area.lower() not in paper.area.lower()) or (done and not cards):
            continue
        rows.append(
            {
                "row": paper.row,
                "title": paper.title,
                "area": paper.area,
                "kind": paper.kind,
                "techniques": [card.name for card in cards],
                "paper": cards[0].paper if cards else "",
            }
        )
    return rows


def paper_table(rows: list[dict[str, Any]]) -> RenderableType:
    """Papers with what stands for them."""
    if not rows:
        return Text("No paper of this area has a technique yet.")
    shown = _with_columns("row", "title", "area", "technique", "paper")
    for row in rows:
        shown.add_row(
            str(row["row"]),
            escape(row["title"]),
            escape(row["area"]),
            ", ".join(row["techniques"]) or "-",
            escape(row["paper"]),
        )
    return shown
