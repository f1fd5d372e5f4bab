"""The figure of all replications: the main effect of each with its interval, on one axis, under the question that a reader asks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any, NamedTuple

from luthier.lab.figure import FOOT, HEAD, LINE, STYLE, WIDTH
from luthier.lab.verdict import CANNOT_TELL, HOLDS, HOLDS_NOT, Verdict
from luthier.report.svg import Element, Scale, add, figure, markup

FURTHEST = 5.0
"""Standard deviations at either end of the axis; what lies beyond is drawn at the end, as an arrow."""
LEFT, RIGHT = 150, 520
OTHERS = "Other questions"
COLORS = """
.holds { fill: #2f6f4f; stroke: #2f6f4f; }
.fails { fill: #a3372f; stroke: #a3372f; }
.open { fill: #8a847b; stroke: #8a847b; }
.bar { stroke-width: 2.5; }
.margin { stroke: #3d3a36; stroke-width: 1.5; }
.small { font-size: 11px; }
"""
_CLASSES = {HOLDS: "holds", HOLDS_NOT: "fails", CANNOT_TELL: "open"}


class Effect(NamedTuple):
    """One replication's main effect in standard deviations of the paired differences, turned so that right is what the paper expects."""

    name: str
    verdict: Verdict
    mean: float
    low: float
    high: float
    margin: float
    """Where the paper's expectation begins: its margin, or its negative where the replication is that nothing is lost."""


def effect_of(result: Mapping[str, Any]) -> Effect | None:
    """A result's main effect; None where it has no interval, or one without width."""
    (main, *_) = result["expectations"]
    if main["interval"] is None or len(set(main["differences"])) == 1:
        return None
    turn = 1.0 if main["direction"] in ("more", "not_less") else -1.0
    unit = turn * stdev(main["differences"])
    low, high = sorted(bound / unit for bound in main["interval"])
    margin = main["margin"] / abs(unit) * (1.0 if main["direction"] in ("more", "less") else -1.0)
    return Effect(result["replication"], result["verdict"], main["mean"] / unit, low, high, margin)


def draw_effects(results: Sequence[Mapping[str, Any]]) -> str:
    """All replications' main effects as an SVG document that stands alone.

    Args:
        results: what `luthier.lab.results.result_of` gives, of replications that ran under the lab's rule.
    """
    groups: dict[str, list[Effect]] = {}
    for result in results:
        if (found := effect_of(result)) is not None:
            groups.setdefault(result["question"] or OTHERS, []).append(found)
    height = sum(HEAD + LINE * len(effects) for effects in groups.values()) + 2 * FOOT + 18
    count = sum(map(len, groups.values()))
    svg = figure(WIDTH, height, f"The main effects of {count} replications in standard deviations between seeds", "replications")
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    add(svg, "style", STYLE + COLORS)
    add(svg, "rect", class_="paper", width=WIDTH, height=height, rx=6)
    scale, top = Scale(-FURTHEST, FURTHEST, LEFT, RIGHT), 4.0
    bottom = height - 2 * FOOT
    for tick in range(-int(FURTHEST), int(FURTHEST) + 1):
        class_ = "axis" if tick == 0 else "grid"
        add(svg, "line", class_=class_, x1=scale.at(tick), x2=scale.at(tick), y1=top, y2=bottom)
        add(svg, "text", f"{tick}", class_="small", x=scale.at(tick), y=bottom + 15, text_anchor="middle")
    add(svg, "text", "against the replication", class_="small", x=LEFT, y=bottom + 34)
    add(svg, "text", "as the paper claims", class_="small", x=RIGHT, y=bottom + 34, text_anchor="end")
    for question, effects in groups.items():
        add(svg, "text", question, class_="title", x=8, y=top + 17)
        top += HEAD
        for one in sorted(effects, key=lambda effect: -effect.mean):
            _row(svg, scale, top + LINE / 2, one)
            top += LINE
    return str(markup(svg))


def _row(svg: Element, scale: Scale, y: float, one: Effect) -> None:
    class_ = _CLASSES[one.verdict]
    add(svg, "text", one.name, x=LEFT - 12, y=y + 4, text_anchor="end")
    low, high = (scale.at(_within(bound)) for bound in (one.low, one.high))
    bar = add(svg, "line", class_=f"bar {class_}", x1=low, x2=max(high, low + 1), y1=y, y2=y)
    add(bar, "title", f"{one.name}: {one.mean:.2g} ({one.low:.2g} to {one.high:.2g}) standard deviations, {one.verdict}")
    if abs(one.margin) <= FURTHEST:
        add(svg, "line", class_="margin", x1=scale.at(one.margin), x2=scale.at(one.margin), y1=y - 7, y2=y + 7)
    x = scale.at(_within(one.mean))
    if abs(one.mean) > FURTHEST:
        tip = math.copysign(9, one.mean)
        add(svg, "polygon", class_=class_, points=f"{x + tip:g},{y:g} {x:g},{y - 5:g} {x:g},{y + 5:g}")
    else:
        add(svg, "circle", class_=class_, cx=x, cy=y, r=4)
    add(svg, "text", one.verdict, class_="small", x=RIGHT + 16, y=y + 4)


def _within(value: float) -> float:
    return max(-FURTHEST, min(FURTHEST, value))
