"""Markdown: cells, code, tables, links to papers."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable


def cell(text: str) -> str:
    """Text that stays within one cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def code(text: str) -> str:
    """The same, as code, which Markdown shows as it stands."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`" if text else ""


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(header)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paper(source: str) -> str:
    """A paper's source, with a link where it is an arXiv number."""
    number = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", source)
    return f"[{source}](https://arxiv.org/abs/{number[1]})" if number else cell(source)


def target(name: str) -> str:
    """Where a link to `#name` leads, on GitHub as on the site."""
    return f'<a id="{name}"></a>'
