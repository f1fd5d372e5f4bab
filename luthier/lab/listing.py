"""The list of the replications, with what came of them; it is made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding

from luthier.lab import replications
from luthier.lab.verdicts import entry, load, worded
from luthier.registry.listing import VERDICTS


def listed(out: Path) -> list[dict[str, Any]]:
    """Every replication, with its verdict and its rough cost: that of the result in the folder, else the one that comes with luthier."""
    known: dict[str, Any] = json.loads(VERDICTS.read_text(encoding="utf-8"))
    found = []
    for name in replications.names():
        line = replications.line(name)
        result = load(out, name)
        told = known.get(name) if result is None else entry(result)
        facts = {key: None if told is None else told[key] for key in ("verdict", "words")}
        found.append({"name": name, "title": line.title, **facts, "minutes": line.minutes})
    return found


def table(found: list[dict[str, Any]]) -> RenderableType:
    """The list for the terminal."""
    if not found:
        return "no replications"
    lines: list[RenderableType] = []
    for one in found:
        verdict = "[dim]not measured[/dim]" if one["verdict"] is None else worded(one)
        lines.append(f"[bold]{escape(one['name'])}[/bold]  {escape(one['title'])}")
        lines.append(Padding(f"{verdict} [dim](about {one['minutes']:g} minutes)[/dim]", (0, 0, 0, 4)))
    return Group(*lines)
