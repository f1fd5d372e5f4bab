"""The heat map of what changed in the weights: the delta's norm, relative to the base's, by block and role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from luthier.report.svg import Element, Scale, add, figure, markup
from luthier.report.words import count, percent, plural, shown, spaced

WIDTH = 760
LABELS = 132
"""Pixels left of the grid, for the names of the roles."""
TOTALS = 74
"""Pixels right of it, for a role's total."""
BARS = 40
ROW = 19
WIDEST = 40
"""Cells of a model of few blocks are no wider."""
NARROWEST = 200
"""The grid is never narrower, so that what stands outside the blocks has room."""


class Change(NamedTuple):
    """How far some tensors moved: norms add as squares."""

    norm: float
    base_norm: float
    numbers: int
    changed: int

    @property
    def relative(self) -> float | None:
        """The norm of the change over the norm of the base; None where the base has none."""
        return self.norm / self.base_norm if self.base_norm > 0 else None

    def words(self) -> str:
        """How far, and how many numbers: `0.31 % of its norm; 331,776 of 331,776 numbers`."""
        moved = f"{percent(self.relative)} of its norm" if self.relative is not None else "no base to compare with"
        return f"{moved}; {count(self.changed)} of {count(self.numbers)} numbers"


def total_change(places: Iterable[Mapping[str, Any]]) -> Change:
    """The change of several places of `delta.by_place` together."""
    some = list(places)
    return Change(
        math.sqrt(sum((place.get("norm") or 0.0) ** 2 for place in some)),
        math.sqrt(sum((place.get("base_norm") or 0.0) ** 2 for place in some)),
        sum(place.get("parameters") or 0 for place in some),
        sum(place.get("changed") or 0 for place in some),
    )


def changes_by_role(delta: Mapping[str, Any]) -> list[tuple[str, Change]]:
    """The change of every role, over all blocks, in the order the model has them."""
    return [(role, total_change(some)) for role, some in _by(delta.get("by_place") or (), "module_type").items()]


class Grid(NamedTuple):
    """Where the heat map's cells lie."""

    blocks: int
    cell: float
    """Pixels of a cell across."""
    width: float
    strongest: float
    """The largest relative change of a cell: full color."""

    @property
    def right(self) -> float:
        """The grid's right end."""
        return LABELS + self.width


def change_figure(delta: Mapping[str, Any]) -> Markup:
    """Heat map of the relative change by role (down) and block (across), with both totals. Empty without places."""
    places = delta.get("by_place") or ()
    inside = [place for place in places if place.get("block") is not None]
    outside = [place for place in places if place.get("block") is None]
    if not places:
        return Markup("")
    rows = _by(inside, "module_type")
    below = BARS + 26 + ROW * len(rows)
    grid = _grid(places)
    words = f"Change by block and role, {plural(grid.blocks, 'block')}: in all {total_change(places).words()}"
    svg = figure(WIDTH, below + 24 + ROW * len(_by(outside, "module_type")) + 8, words, "heat")
    _block_bars(svg, grid, {block: total_change(some) for block, some in _by(inside, "block").items()})
    _block_numbers(svg, grid, below + 14)
    for row, (role, some) in enumerate(rows.items()):
        y = BARS + 26 + ROW * row
        for block, cell in _by(some, "block").items():
            x = LABELS + grid.cell * block
            _cell(svg, grid, x, y, grid.cell, total_change(cell), f"block {block}, {spaced(role)}")
        _row_words(svg, grid, role, y, total_change(some))
    for row, (role, some) in enumerate(_by(outside, "module_type").items()):
        y = below + 24 + ROW * row
        _cell(svg, grid, LABELS, y, grid.width, total_change(some), spaced(role))
        _row_words(svg, grid, role, y, total_change(some))
    return markup(svg)


def _grid(places: Iterable[Mapping[str, Any]]) -> Grid:
    cells = _by(places, "role", "block")
    blocks = 1 + max((block for _, block in cells if block is not None), default=-1)
    cell = min(WIDEST, (WIDTH - LABELS - TOTALS) / max(blocks, 1))
    strongest = max((total_change(some).relative or 0.0 for some in cells.values()), default=0.0)
    return Grid(blocks, cell, max(cell * blocks, NARROWEST), strongest)


def _by(places: Iterable[Mapping[str, Any]], *keys: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Places by one fact or several, in the order met."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for place in places:
        key = tuple(place.get(one) for one in keys)
        found.setdefault(key[0] if len(keys) == 1 else key, []).append(place)
    return found


def _block_bars(svg: Element, grid: Grid, blocks: Mapping[int, Change]) -> None:
    if not blocks:
        return
    most = max(change.relative or 0.0 for change in blocks.values())
    up = Scale(0.0, most or 1.0, 0.0, BARS)
    add(svg, "text", "each block", class_="role", x=LABELS - 10, y=BARS + 16, text_anchor="end")
    add(svg, "text", shown(most, percent), class_="total", x=grid.right + TOTALS, y=24, text_anchor="end")
    for block, change in blocks.items():
        bar = up.at(change.relative or 0.0)
        x, width = LABELS + grid.cell * block + 1, max(grid.cell - 2, 1.0)
        mark = add(svg, "rect", class_="bar", x=x, y=BARS + 20 - bar, width=width, height=bar)
        add(mark, "title", f"block {block}: {change.words()}")


def _block_numbers(svg: Element, grid: Grid, y: float) -> None:
    every = max(1, math.ceil(28 / grid.cell))
    for block in range(0, grid.blocks, every):
        add(svg, "text", str(block), class_="tick", x=LABELS + grid.cell * (block + 0.5), y=y, text_anchor="middle")


def _cell(svg: Element, grid: Grid, x: float, y: float, width: float, change: Change, where: str) -> None:
    box: dict[str, float] = {"x": x + 1, "y": y + 1, "width": max(width - 2, 1.0), "height": ROW - 2, "rx": 2}
    if change.norm > 0:
        share = (change.relative or 0.0) / grid.strongest if grid.strongest else 0.0
        # The faintest shade is still told from a place that did not move at all, which is only outlined.
        cell = add(svg, "rect", class_="cell", fill_opacity=round(0.12 + 0.88 * share, 3), **box)
    else:
        cell = add(svg, "rect", class_="still", **box)
    add(cell, "title", f"{where}: {change.words()}")


def _row_words(svg: Element, grid: Grid, role: str, y: float, change: Change) -> None:
    add(svg, "text", spaced(role), class_="role", x=LABELS - 10, y=y + 13, text_anchor="end")
    words = "unchanged" if change.norm == 0 else shown(change.relative, percent)
    add(svg, "text", words, class_="total", x=grid.right + TOTALS, y=y + 13, text_anchor="end")
