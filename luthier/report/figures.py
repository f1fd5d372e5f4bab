"""Figures as inline SVG. Colors come from the page's style sheet by class, so that a figure follows light, dark and print.

Every figure is drawn with `xml.etree`, which escapes text and attributes; nothing here joins markup as strings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

from luthier.report.facts import Estimate, Facts, SetFacts
from luthier.report.words import NOT_MEASURED, clean, measured, number, percent, plural, shown, spaced

Element = ElementTree.Element
Point = tuple[float, float | None]
"""An optimizer step and a value; None where there is none."""

WIDTH = 760
LEFT = 62
RIGHT = 18
MOST_POINTS = 300
"""Longer curves are drawn as means of equally many neighboring steps, so that a page stays light."""


class Curve(NamedTuple):
    """One panel of the training figure."""

    title: str
    points: Sequence[Point]
    height: int
    dots: bool = False
    """Whether single points are marked: few measurements, rather than one a step."""


class Scale(NamedTuple):
    """Maps values from `low` to `high` onto pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.stop - self.start), 2)


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers within a range, `most` at most: steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0, 84)
    [0.0, 50.0]
    """
    if not high > low:
        return [low]
    rough = 10 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        step = rough * factor
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def interval_figure(one: SetFacts) -> Markup:
    """A set's values before and after on one line, each with its 95 % interval. Empty when nothing was measured."""
    estimates = {"before": one.before, "after": one.after}
    if not any(measured(estimate.value) for estimate in estimates.values()):
        return Markup("")
    words = ", ".join(f"{name} {_with_interval(one, estimate)}" for name, estimate in estimates.items())
    svg = _figure(260, 46, f"{one.name}: {words}", "interval")
    scale = Scale(*_range_of(one), 8, 252)
    _add(svg, "line", class_="axis", x1=scale.start, x2=scale.stop, y1=33.5, y2=33.5)
    for value, x, anchor in ((scale.low, scale.start, "start"), (scale.high, scale.stop, "end")):
        _add(svg, "text", one.form(value), class_="tick", x=x, y=45, text_anchor=anchor)
    drawn = {name: estimate for name, estimate in estimates.items() if measured(estimate.value)}
    if len(drawn) == 2:
        before, after = (scale.at(estimate.value or 0.0) for estimate in drawn.values())
        _add(svg, "line", class_=f"move {_verdict_class(one.verdict)}", x1=before, x2=after, y1=10, y2=23)
    for y, (name, estimate) in zip((10, 23), drawn.items(), strict=False):
        if measured(estimate.low) and measured(estimate.high):
            low, high = scale.at(estimate.low or 0.0), scale.at(estimate.high or 0.0)
            _add(svg, "line", class_=f"whisker {name}", x1=low, x2=high, y1=y, y2=y)
        dot = _add(svg, "circle", class_=f"dot {name} {_verdict_class(one.verdict)}", cx=scale.at(estimate.value or 0.0), cy=y, r=4.5)
        _add(dot, "title", f"{name} {_with_interval(one, estimate)}")
    return _markup(svg)


def training_figure(run: Facts, sets: Sequence[SetFacts]) -> Markup:
    """Loss, learning rate and the evaluations over the optimizer steps. Empty when no step was recorded."""
    history = run.get("history") or ()
    if not history:
        return Markup("")
    curves = [
        Curve("loss", _column(history, "loss"), 170),
        *_evaluation_curves(run, sets, int(history[-1]["step"])),
        Curve("learning rate", _column(history, "learning_rate"), 46),
    ]
    curves = [curve for curve in curves if any(measured(value) for _, value in curve.points)]
    steps = [point[0] for curve in curves for point in curve.points] or [0]
    height = sum(curve.height + 34 for curve in curves) + 30
    described = "; ".join(_described(curve) for curve in curves)
    svg = _figure(WIDTH, height, f"Over {plural(int(max(steps)), 'optimizer step')}: {described}", "training")
    across = Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    top = 22.0
    for curve in curves:
        _panel(svg, curve, across, top)
        top += curve.height + 34
    for tick in ticks(across.low, across.high, 8):
        _add(svg, "text", f"{tick:,g}", class_="tick", x=across.at(tick), y=top - 14, text_anchor="middle")
    _add(svg, "text", "optimizer step", class_="tick", x=across.stop, y=top + 4, text_anchor="end")
    return _markup(svg)


def _evaluation_curves(run: Facts, sets: Sequence[SetFacts], last: int) -> list[Curve]:
    points: dict[str, list[Point]] = {one.name: [(0, one.before.value)] for one in sets}
    for evaluation in run.get("evaluations") or ():
        for name, value in (evaluation.get("metrics") or {}).items():
            points.setdefault(name, []).append((evaluation["step"], value))
    for one in sets:
        if points[one.name][-1][0] != last:
            points[one.name].append((last, one.after.value))
    metrics = {one.name: f"{one.name}, {spaced(one.metric)}" for one in sets}
    return [Curve(metrics.get(name, name), found, 60, dots=True) for name, found in list(points.items())[:6]]


def _panel(svg: Element, curve: Curve, across: Scale, top: float) -> None:
    values = [value for _, value in curve.points if measured(value) and value is not None]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    up = Scale(low - margin, high + margin, top + curve.height, top)
    _add(svg, "text", curve.title, class_="panel-title", x=LEFT, y=top - 8)
    for tick in ticks(up.low, up.high, 5 if curve.height > 100 else 2):
        y = up.at(tick)
        _add(svg, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)
        _add(svg, "text", f"{tick:,g}", class_="tick", x=LEFT - 8, y=y + 3.5, text_anchor="end")
    points, group = _thinned(curve.points)
    window = max(1, len(points) // 20)
    smooth = not curve.dots and curve.height > 100 and window > 1
    for run_of_points in _unbroken(points):
        _line(svg, run_of_points, across, up, "curve faint" if smooth else "curve")
    if smooth:
        for run_of_points in _unbroken(_trailing_mean(points, window)):
            _line(svg, run_of_points, across, up, "curve")
        note = f"faint: each step; strong: mean of the last {window} steps"
        if group > 1:
            note = f"faint: means of {group} steps; strong: means of the last {window * group}"
        _add(svg, "text", note, class_="tick", x=WIDTH - RIGHT, y=top - 8, text_anchor="end")
    if curve.dots:
        for step, value in curve.points:
            if measured(value) and value is not None:
                dot = _add(svg, "circle", class_="dot after", cx=across.at(step), cy=up.at(value), r=3.5)
                _add(dot, "title", f"{curve.title}, step {step:g}: {number(value)}")


def _line(svg: Element, points: Sequence[tuple[float, float]], across: Scale, up: Scale, class_: str) -> None:
    places = " ".join(f"{across.at(step):g},{up.at(value):g}" for step, value in points)
    _add(svg, "polyline", class_=class_, points=places)


def _thinned(points: Sequence[Point]) -> tuple[list[Point], int]:
    """At most MOST_POINTS points, each the mean of `group` neighbors; a group without a number stays a gap."""
    group = math.ceil(len(points) / MOST_POINTS)
    thinned: list[Point] = []
    for first in range(0, len(points), group):
        some = points[first : first + group]
        values = [value for _, value in some if measured(value) and value is not None]
        thinned.append((some[-1][0], sum(values) / len(values) if values else None))
    return thinned, group


def _trailing_mean(points: Sequence[Point], window: int) -> list[Point]:
    means: list[Point] = []
    for index, (step, value) in enumerate(points):
        some = [v for _, v in points[max(0, index - window + 1) : index + 1] if v is not None]
        means.append((step, sum(some) / len(some) if value is not None and some else None))
    return means


def _unbroken(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    """The stretches of points between gaps."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is not None and measured(value):
            stretches[-1].append((step, value))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _column(history: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    return [(line["step"], line.get(key) if measured(line.get(key)) else None) for line in history]


def _described(curve: Curve) -> str:
    values = [value for _, value in curve.points if measured(value)]
    return f"{curve.title} from {shown(values[0], number)} to {shown(values[-1], number)}"


def _range_of(one: SetFacts) -> tuple[float, float]:
    if one.is_share:
        return 0.0, 1.0
    values = [value for estimate in (one.before, one.after) for value in estimate if value is not None and measured(value)]
    low, high = min(values), max(values)
    margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _with_interval(one: SetFacts, estimate: Estimate) -> str:
    value = shown(estimate.value, one.form)
    if not (measured(estimate.low) and measured(estimate.high)):
        return value
    return f"{value} (95 % interval {shown(estimate.low, one.form)} to {shown(estimate.high, one.form)})"


def _verdict_class(verdict: str) -> str:
    return verdict if verdict in ("better", "worse") else "neutral"


def _figure(width: float, height: float, label: str, class_: str) -> Element:
    box = f"0 0 {width:g} {height:g}"
    return Element("svg", {"class": class_, "viewBox": box, "role": "img", "aria-label": clean(label)})


def _add(parent: Element, tag: str, text: str | None = None, **attributes: str | float) -> Element:
    named = {name.rstrip("_").replace("_", "-"): f"{value:g}" if isinstance(value, float) else str(value) for name, value in attributes.items()}
    child = ElementTree.SubElement(parent, tag, named)
    child.text = None if text is None else clean(text)
    return child


def _markup(svg: Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
