"""Figures of what changed: a set's values before and after, and the delta's norm by block and role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from luthier.report.facts import Estimate, SetFacts
from luthier.report.svg import Element, Scale, add, figure, markup
from luthier.report.words import count, measured, percent, plural, shown, spaced

Range = tuple[float, float]

LABELS = 132
"""Pixels left of the heat map for the names of the roles."""
TOTALS = 74
BARS = 40
WIDTH = 760
ROW = 19


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
        sum(place.get("numbers") or 0 for place in some),
        sum(place.get("changed") or 0 for place in some),
    )


def changes_by_role(delta: Mapping[str, Any]) -> list[tuple[str, Change]]:
    """The change of every role, over all blocks, in the order the model has them."""
    places = delta.get("by_place") or ()
    return [
        (role, total_change(p for p in places if p["role"] == role))
        for role in dict.fromkeys(p["role"] for p in places)
    ]


def interval_figure(one: SetFacts, span: Range | None = None) -> Markup:
    """A set's values before and after, each with its 95 % interval. Empty when nothing was measured.

    Args:
        one: the set.
        span: the values at both ends; None: the set's own range.
    """
    drawn = {"before": one.before, "after": one.after}
    drawn = {name: estimate for name, estimate in drawn.items() if measured(estimate.value)}
    if not drawn:
        return Markup("")
    words = ", ".join(f"{name} {_with_interval(one, estimate)}" for name, estimate in drawn.items())
    svg = figure(240, 46, f"{one.name}: {words}", "interval")
    scale = Scale(*(span or range_of([one])), 8, 232)
    tone = one.verdict if one.verdict in ("better", "worse") else "neutral"
    add(svg, "line", class_="axis", x1=scale.start, x2=scale.stop, y1=33.5, y2=33.5)
    add(svg, "text", one.form(scale.low), class_="tick", x=scale.start, y=45)
    add(svg, "text", one.form(scale.high), class_="tick", x=scale.stop, y=45, text_anchor="end")
    places = [scale.at(estimate.value) for estimate in drawn.values() if measured(estimate.value)]
    add(svg, "line", class_=f"move {tone}", x1=places[0], x2=places[-1], y1=10, y2=23)
    for (name, estimate), x, y in zip(drawn.items(), places, (10, 23), strict=False):
        if measured(estimate.low) and measured(estimate.high):
            ends = {"x1": scale.at(estimate.low), "x2": scale.at(estimate.high)}
            add(svg, "line", class_=f"whisker {name} {tone}", y1=y, y2=y, **ends)
        dot = add(svg, "circle", class_=f"dot {name} {tone}", cx=x, cy=y, r=4.5)
        add(dot, "title", f"{name} {_with_interval(one, estimate)}")
    return markup(svg)


def range_of(sets: Sequence[SetFacts]) -> Range:
    """The range a figure of some sets needs: all possible values, or those measured and some room."""
    if all(one.whole is not None for one in sets):
        return 0.0, 1.0
    values = [value for one in sets for estimate in (one.before, one.after) for value in estimate if measured(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def change_figure(delta: Mapping[str, Any]) -> Markup:
    """Heat map of the relative change by role (down) and block (across), with both totals. Empty without places."""
    places = [place for place in delta.get("by_place") or () if place.get("role")]
    if not places:
        return Markup("")
    cells: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for place in places:
        cells.setdefault((place["role"], place.get("block")), []).append(place)
    changes = {key: total_change(some) for key, some in cells.items()}
    blocks = 1 + max((block for _, block in cells if block is not None), default=-1)
    inside = list(dict.fromkeys(role for role, block in cells if block is not None))
    outside = [role for role, block in cells if block is None]
    most = max((change.relative or 0.0 for change in changes.values()), default=0.0)
    top = BARS + 26 if blocks else 4
    height = top + ROW * (len(inside) + len(outside)) + (24 if inside else 0) + 12
    moved = total_change(places)
    svg = figure(WIDTH, height, f"Change by block and role, {plural(blocks, 'block')}: in all {moved.words()}", "heat")
    width = (WIDTH - LABELS - TOTALS) / max(blocks, 1)
    if blocks:
        _block_bars(svg, [total_change(p for p in places if p.get("block") == block) for block in range(blocks)], width)
    for index, role in enumerate(inside):
        y = top + ROW * index
        for block in range(blocks):
            if (role, block) in changes:
                where = f"block {block}, {spaced(role)}"
                _cell(svg, LABELS + width * block, y, width, changes[role, block], most, where)
        _row_words(svg, role, y, total_change(p for p in places if p["role"] == role and p.get("block") is not None))
    below = top + ROW * len(inside) + (24 if inside else 0)
    _block_numbers(svg, blocks, width, below - 10)
    for index, role in enumerate(outside):
        y = below + ROW * index
        _cell(svg, LABELS, y, WIDTH - LABELS - TOTALS, changes[role, None], most, spaced(role))
        _row_words(svg, role, y, changes[role, None])
    return markup(svg)


def _block_bars(svg: Element, blocks: list[Change], width: float) -> None:
    most = max(change.relative or 0.0 for change in blocks)
    up = Scale(0, most or 1.0, 0, BARS)
    add(svg, "text", "each block", class_="role", x=LABELS - 10, y=BARS + 16, text_anchor="end")
    add(svg, "text", shown(most, percent), class_="tick", x=WIDTH - TOTALS + 10, y=24)
    add(svg, "line", class_="axis", x1=LABELS, x2=WIDTH - TOTALS, y1=BARS + 20.5, y2=BARS + 20.5)
    for block, change in enumerate(blocks):
        bar = up.at(change.relative or 0.0)
        place = {"x": LABELS + width * block + 1, "y": BARS + 20 - bar, "width": max(width - 2, 1), "height": bar}
        add(add(svg, "rect", class_="bar", **place), "title", f"block {block}: {change.words()}")


def _block_numbers(svg: Element, blocks: int, width: float, y: float) -> None:
    every = max(1, math.ceil(28 / width))
    for block in range(0, blocks, every):
        add(svg, "text", str(block), class_="tick", x=LABELS + width * (block + 0.5), y=y, text_anchor="middle")


def _cell(svg: Element, x: float, y: float, width: float, change: Change, most: float, where: str) -> None:
    share = (change.relative or 0.0) / most if most else 0.0
    moved = change.norm > 0
    box = {"x": x + 1, "y": y + 1, "width": max(width - 2, 1), "height": ROW - 2, "rx": 2}
    # The faintest shade is still told from a place that did not move at all, which is only outlined.
    shade = {"fill_opacity": round(0.12 + 0.88 * share, 3)} if moved else {}
    add(add(svg, "rect", class_="cell" if moved else "still", **box, **shade), "title", f"{where}: {change.words()}")


def _row_words(svg: Element, role: str, y: float, change: Change) -> None:
    add(svg, "text", spaced(role), class_="role", x=LABELS - 10, y=y + 13, text_anchor="end")
    words = "unchanged" if change.norm == 0 else shown(change.relative, percent)
    add(svg, "text", words, class_="total", x=WIDTH, y=y + 13, text_anchor="end")


def _with_interval(one: SetFacts, estimate: Estimate) -> str:
    interval = estimate.interval(one.form)
    return one.value(estimate.value) + (f" (95 % interval {interval})" if interval else "")
