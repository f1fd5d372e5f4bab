"""The list of techniques by what people want of them, one line each, read from their files without running any."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any, NamedTuple

from rich.text import Text

from luthier import registry
from luthier.errors import LuthierError, nearest, plain_name
from luthier.registry.papers import papers
from luthier.registry.purposes import sorted_out

START = (
    "start here: lora, full, half",
    "  lora  where memory is short, or each task should be one small file",
    "  full  where memory suffices and rows are many: everything may change",
    "  half  as full, with half of the matrices frozen, so that less is forgotten",
)
MARKS = {"holds": "+", "does not hold": "-", "cannot tell": "?"}
LEGEND = "Claims of papers, run again at a small scale: + holds, - does not, ? cannot tell. Whose claim: luthier techniques NAME."
VERDICTS = Path(__file__).parent / "verdicts.json"
"""What came of the replications that were run, by replication, with the size of the effect; `luthier.lab.verdicts` writes it."""
MOST_LIKE = 8


class Line(NamedTuple):
    """A technique in a list."""

    name: str
    kind: str
    summary: str
    row: int | None
    paper: str
    replication: str
    text: str
    """What a search looks through."""


def lines(kind: str | None = None) -> list[Line]:
    """All techniques, or those of one kind, by kind and name.

    Raises:
        LuthierError: there is no such kind.
    """
    if kind is not None:
        registry.names(kind)
    titles: dict[int | None, str] = {paper.row: paper.title for paper in papers()}
    found = []
    for where, name, told in registry.outlines(None if kind is None else (kind,)):
        card: Mapping[str, Any]
        if told is None:
            whole = registry.find(name, (where,)).card
            card, summary, text = whole.as_json(), whole.summary, f"{name}\n{whole.title}\n{whole.summary}\n{whole.paper}"
        else:
            card, summary, text = told.card, told.summary, told.text
        row = card.get("row")
        paper, replication = str(card.get("paper", "")), str(card.get("replication", ""))
        found.append(Line(name, where, summary, row, paper, replication, f"{text}\n{titles.get(row, '')}"))
    return found


def search(among: Iterable[Line], words: str) -> list[Line]:
    """Those that hold all of the words, in whatever case, in name, title, docstring or paper.

    Raises:
        LuthierError: none does.
    """
    wanted = words.lower().split()
    found = [line for line in among if all(word in line.text.lower() for word in wanted)]
    if not found:
        raise LuthierError(f"no technique speaks of `{words}`", where="--search", fix="search for fewer words, or parts of words")
    return found


def like(among: Sequence[Line], name: str) -> list[Line]:
    """Techniques of the same purpose, the nearest first: of the same paper, of the same kind, then by the words that both use.

    Raises:
        LuthierError: there is no such technique.
    """
    one = next(line for line in among if line.name == known(name))
    near = [line for _, members in sorted_out(among) if one in members for line in members if line is not one]

    def far(line: Line) -> tuple[bool, bool, float, str]:
        mine, other = _words(one), _words(line)
        shared = len(mine & other) / max(len(mine | other), 1)
        return line.row is None or line.row != one.row, line.kind != one.kind, -shared, line.name

    return sorted(near, key=far)[:MOST_LIKE]


def _words(line: Line) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", f"{line.name} {line.summary}".lower()))


def known(name: str) -> str:
    """A technique's name, as papers may write it: `LoRA`, `prompt-tuning`.

    Raises:
        LuthierError: there is none; the nearest names.
    """
    names = [other for kind in registry.KINDS for other in registry.names(kind)]
    for one in (name, plain_name(name).replace(" ", "_")):
        if one in names:
            return one
    fix = nearest(name, names) or f"`luthier techniques --search {name}` looks through titles, descriptions and papers"
    raise LuthierError(f"there is no technique `{name}`", where="luthier techniques", fix=fix)


def grouped(found: Sequence[Line], width: int, *, start: bool = False, ordered: bool = False) -> Text:
    """Techniques under what people want of them, one line each, cut at a word.

    Args:
        found: the techniques.
        width: columns of the terminal.
        start: begin with where to start.
        ordered: keep the order, under no groups.
    """
    verdicts = json.loads(VERDICTS.read_text(encoding="utf-8"))
    text = Text("\n".join([*START, "", ""]) if start else "")
    groups = {"": found} if ordered else {purpose.title: members for purpose, members in sorted_out(found)}
    marked = False
    for title, members in groups.items():
        if members and title:
            text.append(f"{shorten(title, width, placeholder='…')}\n", style="bold")
        wide = max((len(one.name) for one in members), default=0)
        for one in members:
            mark = MARKS.get(verdicts.get(one.replication, {}).get("verdict"), " ")
            marked |= mark != " "
            text.append(f"  {one.name:<{wide}}", style="cyan")
            text.append(f" {mark} {shorten(one.summary, max(width - wide - 5, 10), placeholder='…', break_on_hyphens=False)}\n")
    if marked:
        text.append("\n".join(["", *wrap(LEGEND, width)]), style="dim")
    text.rstrip()
    return text
