"""The radar chart of the synthetic benchmark: one axis a skill, from 0 in the middle to 1 at the rim, before and after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from luthier.report.facts import Estimate, SetFacts
from luthier.report.svg import Element, add, figure, markup
from luthier.report.words import measured, percent, shown, spaced

BENCHMARK = "benchmark/"
"""What the names of its evaluation sets begin with. No point: those separate keys on the command line."""
FEWEST_AXES = 3
"""Fewer have no area between them."""

_WIDTH, _HEIGHT, _RADIUS = 640.0, 500.0, 190.0
_CENTER = (_WIDTH / 2, _HEIGHT / 2 - 8)
_RINGS = (0.25, 0.5, 0.75, 1.0)

Point = tuple[float, float]


class Axis(NamedTuple):
    """One skill: its share before, where that was measured, and after."""

    name: str
    before: Estimate
    after: Estimate


class _Spoke(NamedTuple):
    axis: Axis
    angle: float

    def at(self, share: float) -> Point:
        """Where a share stands on this axis."""
        x, y = math.sin(self.angle), -math.cos(self.angle)
        return round(_CENTER[0] + share * _RADIUS * x, 2), round(_CENTER[1] + share * _RADIUS * y, 2)


def axes_of(sets: Sequence[SetFacts]) -> list[Axis]:
    """The axes of sets whose scores are shares; losses have no rim and are left out, as is what was not measured.

    Args:
        sets: evaluation sets, in the order of the axes.
    """
    with_before = any(measured(one.before.value) for one in sets)
    return [
        Axis(spaced(one.name.removeprefix(BENCHMARK)), one.before, one.after)
        for one in sets
        if one.is_share and measured(one.after.value) and measured(one.before.value) == with_before
    ]


def benchmark_figure(sets: Sequence[SetFacts]) -> Markup:
    """The radar of a run's sets that are of the synthetic benchmark; empty where there are none."""
    return radar_figure(axes_of([one for one in sets if one.name.startswith(BENCHMARK)]))


def radar_figure(axes: Sequence[Axis]) -> Markup:
    """Shares as an area: what is measured in color, what was before in gray. Empty with fewer than `FEWEST_AXES`.

    Args:
        axes: clockwise from the top; of all what was before is measured, or of none.
    """
    if len(axes) < FEWEST_AXES:
        return Markup("")
    svg = figure(_WIDTH, _HEIGHT, "; ".join(map(_in_words, axes)), "radar")
    spokes = [_Spoke(axis, 2 * math.pi * place / len(axes)) for place, axis in enumerate(axes)]
    _grid(svg, spokes)
    if measured(axes[0].before.value):
        _area(svg, "before", spokes, [axis.before for axis in axes])
        _legend(svg)
    _area(svg, "after", spokes, [axis.after for axis in axes])
    for spoke in spokes:
        _label(svg, spoke)
    return markup(svg)


def _grid(svg: Element, spokes: Sequence[_Spoke]) -> None:
    for ring in _RINGS:
        add(svg, "polygon", class_="ring", points=_points(one.at(ring) for one in spokes))
    for one in spokes:
        (x1, y1), (x2, y2) = one.at(0), one.at(1)
        add(svg, "line", class_="grid", x1=x1, y1=y1, x2=x2, y2=y2)
    for ring in _RINGS:
        add(svg, "text", percent(ring), class_="tick", x=_CENTER[0] - 5, y=_CENTER[1] - ring * _RADIUS + 12, text_anchor="end")


def _area(svg: Element, tone: str, spokes: Sequence[_Spoke], estimates: Sequence[Estimate]) -> None:
    places = [spoke.at(estimate.value or 0.0) for spoke, estimate in zip(spokes, estimates, strict=True)]
    add(svg, "polygon", class_=f"area {tone}", points=_points(places))
    for spoke, estimate, (x, y) in zip(spokes, estimates, places, strict=True):
        dot = add(svg, "circle", class_=f"dot {tone}", cx=x, cy=y, r=3.5)
        add(dot, "title", f"{spoke.axis.name}, {tone}: {_estimated(estimate)}")


def _label(svg: Element, spoke: _Spoke) -> None:
    x, y = spoke.at(1 + 14 / _RADIUS)
    side = math.sin(spoke.angle)
    anchor = "middle" if abs(side) < 0.1 else "start" if side > 0 else "end"
    # A line of text hangs from its base: above the center it ends there, below it begins there.
    drop = 4 - 5 * math.cos(spoke.angle)
    add(svg, "text", spoke.axis.name, x=x, y=round(y + drop, 2), text_anchor=anchor)


def _legend(svg: Element) -> None:
    for place, tone in enumerate(("before", "after")):
        x, y = 16 + 90 * place, _HEIGHT - 10
        add(svg, "circle", class_=f"dot {tone}", cx=x, cy=y - 4, r=5)
        add(svg, "text", tone, x=x + 12, y=y)


def _in_words(axis: Axis) -> str:
    now = f"{axis.name} {_estimated(axis.after)}"
    return f"{now}, {_estimated(axis.before)} before" if measured(axis.before.value) else now


def _estimated(estimate: Estimate) -> str:
    interval = estimate.interval(percent)
    return shown(estimate.value, percent) + (f" (95 % interval {interval})" if interval else "")


def _points(points: Iterable[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
