"""The figure of one evaluation set: its values before and after, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from luthier.report.facts import Estimate, SetFacts
from luthier.report.svg import Scale, add, figure, markup
from luthier.report.words import measured

Range = tuple[float, float]


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


def _with_interval(one: SetFacts, estimate: Estimate) -> str:
    interval = estimate.interval(one.form)
    return one.value(estimate.value) + (f" (95 % interval {interval})" if interval else "")
