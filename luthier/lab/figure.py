"""The figure of a replication's result: of each measure, every variant's seeds as points and their mean as a bar, on one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from luthier.report.svg import Element, Scale, add, figure, markup, ticks
from luthier.report.words import spaced

WIDTH, LEFT, RIGHT = 640, 190, 616
LINE, HEAD, FOOT, GAP = 22, 26, 24, 14
STYLE = """
.paper { fill: #fcfaf7; }
text { font: 12px system-ui, sans-serif; fill: #3d3a36; }
.title { font-weight: 600; }
.axis, .grid { stroke: #8a847b; }
.grid { stroke-opacity: .25; }
.point { fill: #8a5a2b; fill-opacity: .55; }
.mean { stroke: #8a5a2b; stroke-width: 2.5; }
"""


def draw(result: Mapping[str, Any]) -> str:
    """A result as an SVG document that stands alone; a title without panels where nothing has a number.

    Args:
        result: what `luthier.lab.results.result_of` gives.
    """
    variants = result["variants"]
    panels = [
        (name, [[one for one in variant["numbers"][name] if one is not None] for variant in variants])
        for name in result["measures"]
    ]
    panels = [(name, values) for name, values in panels if any(values)]
    tall = HEAD + LINE * len(variants) + FOOT + GAP
    height = max(tall * len(panels), 2 * HEAD)
    svg = figure(WIDTH, height, f"{result['title']}: {result['verdict']} at this scale", "replication")
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    # A picture cannot know whether its page is light or dark, so it brings its own paper.
    add(svg, "style", STYLE)
    add(svg, "rect", class_="paper", width=WIDTH, height=height, rx=6)
    if not panels:
        add(svg, "text", "no variant has a number", x=8, y=HEAD)
    for index, (name, values) in enumerate(panels):
        _panel(svg, index * tall, name, [variant["name"] for variant in variants], values)
    return str(markup(svg))


def _panel(svg: Element, top: float, name: str, variants: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    everything = [one for several in values for one in several]
    room = 0.06 * (max(everything) - min(everything)) or 0.1 * abs(everything[0]) or 1.0
    scale = Scale(min(everything) - room, max(everything) + room, LEFT, RIGHT)
    bottom = top + HEAD + LINE * len(variants)
    add(svg, "text", spaced(name), class_="title", x=8, y=top + 17)
    for value in ticks(scale.low, scale.high):
        x = scale.at(value)
        add(svg, "line", class_="grid", x1=x, x2=x, y1=top + HEAD, y2=bottom)
        add(svg, "text", f"{value:g}", x=x, y=bottom + 16, text_anchor="middle")
    add(svg, "line", class_="axis", x1=LEFT, x2=RIGHT, y1=bottom, y2=bottom)
    for number, (variant, several) in enumerate(zip(variants, values, strict=True)):
        y = top + HEAD + LINE * (number + 0.5)
        add(svg, "text", variant, x=LEFT - 12, y=y + 4, text_anchor="end")
        for value in several:
            add(add(svg, "circle", class_="point", cx=scale.at(value), cy=y, r=4), "title", f"{variant}: {value:g}")
        if several:
            middle = scale.at(fmean(several))
            add(svg, "line", class_="mean", x1=middle, x2=middle, y1=y - 8, y2=y + 8)
