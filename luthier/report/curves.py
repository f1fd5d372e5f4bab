"""The training figure: loss, evaluations and learning rate over the optimizer steps, one panel each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from luthier.report.facts import Facts, SetFacts
from luthier.report.svg import Element, Scale, add, figure, markup, ticks
from luthier.report.words import measured, number, percent, plural, spaced

Point = tuple[float, float | None]
"""An optimizer step and a value; None where there is none."""

WIDTH = 760
LEFT = 62
RIGHT = 18
BETWEEN = 34
"""Pixels between two panels: room for a title."""
MOST_POINTS = 300
"""Longer curves are drawn as means of equally many neighboring steps, so that a page stays light."""
MOST_PARTS = 4
"""Objectives drawn; all of them stand in the run's `steps.jsonl`."""
MOST_NOTES = 4
"""Curves of what techniques log; all of it stands in the run's `steps.jsonl`."""
MOST_SETS = 6
"""Evaluation sets drawn; all of them stand in the table."""


class Curve(NamedTuple):
    """One panel."""

    title: str
    points: Sequence[Point]
    height: int
    ticks: int
    """Most values named on the left."""
    draw: Callable[[Element, Curve, Scale, Scale], str]
    """Draws the points with the scales across and up; returns a note on how to read them."""
    form: Callable[[float], str] = number
    tick: Callable[[float], str] = "{:,.12g}".format
    """How a value named on the left reads: with all its digits, so that no two read the same."""
    whole: tuple[float, float] | None = None
    """The range to show whatever the values are, so that a small change looks small; None: the values' own."""


def training_figure(run: Facts, sets: Sequence[SetFacts]) -> Markup:
    """Loss, evaluations and learning rate over the optimizer steps. Empty when no step was recorded."""
    history = run.get("history") or ()
    curves = [
        Curve("loss", column(history, "loss"), 170, 5, _smoothed),
        *_likelihood_curves(history),
        *_part_curves(history),
        *_weight_curves(history),
        *_evaluation_curves(run, sets),
        Curve("learning rate", column(history, "learning_rate"), 46, 3, _plain),
    ]
    curves = [curve for curve in curves if any(measured(value) for _, value in curve.points)]
    if not history or not curves:
        return Markup("")
    steps = [step for curve in curves for step, _ in curve.points]
    across = Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    described = "; ".join(_described(curve) for curve in curves)
    height = sum(curve.height + BETWEEN for curve in curves) + 30
    svg = figure(WIDTH, height, f"Over {plural(int(max(steps)), 'optimizer step')}: {described}", "training")
    top = 22.0
    for curve in curves:
        _panel(svg, curve, across, top)
        top += curve.height + BETWEEN
    for tick in ticks(across.low, across.high, 8):
        add(svg, "text", f"{tick:,g}", class_="tick", x=across.at(tick), y=top - 14, text_anchor="middle")
    add(svg, "text", "optimizer step", class_="tick", x=across.stop, y=top + 4, text_anchor="end")
    return markup(svg)


def _panel(svg: Element, curve: Curve, across: Scale, top: float) -> None:
    values = [value for _, value in curve.points if measured(value)]
    low, high = curve.whole or (min(values), max(values))
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    up = Scale(low - margin, high + margin, top + curve.height, top)
    for tick in ticks(up.low, up.high, curve.ticks):
        y = up.at(tick)
        add(svg, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)
        add(svg, "text", curve.tick(tick), class_="tick", x=LEFT - 8, y=y + 3.5, text_anchor="end")
    note = curve.draw(svg, curve, across, up)
    add(svg, "text", curve.title, class_="panel-title", x=LEFT, y=top - 8)
    add(svg, "text", note, class_="tick", x=WIDTH - RIGHT, y=top - 8, text_anchor="end")


def _plain(svg: Element, curve: Curve, across: Scale, up: Scale) -> str:
    draw_line(svg, thinned(curve.points)[0], across, up, "curve")
    return ""


def _dotted(svg: Element, curve: Curve, across: Scale, up: Scale) -> str:
    draw_line(svg, curve.points, across, up, "curve")
    for step, value in curve.points:
        if measured(value):
            dot = add(svg, "circle", class_="dot neutral", cx=across.at(step), cy=up.at(value), r=3.5)
            add(dot, "title", f"{curve.title}, step {step:g}: {curve.form(value)}")
    return ""


def _smoothed(svg: Element, curve: Curve, across: Scale, up: Scale) -> str:
    points, group = thinned(curve.points)
    window = len(points) // 20
    if window < 2:
        draw_line(svg, points, across, up, "curve")
        return "" if group == 1 else f"means of {group} steps"
    draw_line(svg, points, across, up, "curve faint")
    draw_line(svg, _smooth(points, window // 2), across, up, "curve")
    faint = "each step" if group == 1 else f"means of {group} steps"
    return f"faint: {faint}; strong: means of {(2 * (window // 2) + 1) * group} steps"


def draw_line(svg: Element, points: Iterable[Point], across: Scale, up: Scale, class_: str) -> None:
    """Draw a curve, with a gap where a value is missing."""
    for stretch in _unbroken(points):
        places = " ".join(f"{across.at(step):g},{up.at(value):g}" for step, value in stretch)
        add(svg, "polyline", class_=class_, points=places)


def _unbroken(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    """The stretches of points between gaps."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if measured(value):
            stretches[-1].append((step, value))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def thinned(points: Sequence[Point]) -> tuple[list[Point], int]:
    """At most MOST_POINTS points, each the mean of `group` neighbors; a group without any number stays a gap."""
    group = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = [points[first : first + group] for first in range(0, len(points), group)]
    return [(some[-1][0], _mean(value for _, value in some)) for some in groups], group


def _smooth(points: Sequence[Point], reach: int) -> list[Point]:
    """Each value's mean with `reach` neighbors on both sides; at the ends fewer, but as many on both."""
    means = []
    for index, (step, value) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        some = [neighbor for _, neighbor in points[index - near : index + near + 1]]
        means.append((step, None if value is None else _mean(some)))
    return means


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if measured(value)]
    return sum(found) / len(found) if found else None


def _likelihood_curves(history: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """The plain negative log-likelihood, where the loss is something else."""
    loss, nll = column(history, "loss"), column(history, "nll")
    same = all(a is None or b is None or math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(loss, nll, strict=True))
    return [] if same else [Curve("negative log-likelihood", nll, 80, 3, _smoothed)]


def _part_curves(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """What each of several objectives adds to the loss, but for one that is the plain negative log-likelihood."""
    names = list(dict.fromkeys(name for line in history for name in line.get("parts") or ()))
    plain = dict(column(history, "nll"))
    drawn = []
    for name in names if len(names) > 1 else ():
        points = [(line["step"], (line.get("parts") or {}).get(name)) for line in history]
        pairs = [(value, plain.get(step)) for step, value in points if measured(value)]
        if not all(other is not None and math.isclose(value, other, rel_tol=1e-6) for value, other in pairs):
            drawn.append(Curve(f"{name}, its part of the loss", points, 60, 3, _smoothed))
    return drawn[:MOST_PARTS]


def _weight_curves(history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """What token weights leave of a step's labels, how sure the model is of them, and what techniques logged."""
    kept = column(history, "weighted_share")
    shares = {
        "share of labels kept": kept if any(value not in (None, 1.0) for _, value in kept) else [],
        "effective share of labels": [(line["step"], _share_of(line)) for line in history],
    }
    drawn = [Curve(title, points, 46, 2, _plain, percent, percent, (0.0, 1.0)) for title, points in shares.items()]
    drawn.append(Curve("entropy", column(history, "entropy"), 60, 3, _smoothed))
    names = list(dict.fromkeys(name for line in history for name in line.get("notes") or ()))
    notes = [[(line["step"], (line.get("notes") or {}).get(name)) for line in history] for name in names]
    drawn += [Curve(name, points, 60, 3, _smoothed) for name, points in zip(names[:MOST_NOTES], notes, strict=False)]
    return [curve for curve in drawn if any(measured(value) for _, value in curve.points)]


def _share_of(line: Mapping[str, Any]) -> float | None:
    # (sum of weights)^2 / sum of their squares: as many targets of equal weight would have as much to say.
    effective, targets = line.get("effective_labels"), line.get("supervised_tokens")
    return effective / targets if measured(effective) and targets else None


def _evaluation_curves(run: Facts, sets: Sequence[SetFacts]) -> list[Curve]:
    """The first sets over the steps."""
    return [_evaluation_curve(one, set_points(run, one)) for one in sets[:MOST_SETS]]


def set_points(run: Facts, one: SetFacts) -> list[Point]:
    """A set's value before, at the evaluations between, and after."""
    last = max((line["step"] for line in run.get("history") or ()), default=0)
    points: dict[int, float | None] = {0: one.before.value, last: one.after.value}
    for evaluation in run.get("evaluations") or ():
        if one.name in (evaluation.get("metrics") or {}):
            points[evaluation["step"]] = evaluation["metrics"][one.name]
    return sorted(points.items())


def _evaluation_curve(one: SetFacts, points: Sequence[Point]) -> Curve:
    curve = Curve(f"{one.name}, {spaced(one.metric)}", points, 60, 3, _dotted, one.form, whole=one.whole)
    return curve._replace(tick=percent) if one.is_share else curve


def column(history: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """What each step recorded under a key."""
    return [(line["step"], line[key] if measured(line.get(key)) else None) for line in history]


def _described(curve: Curve) -> str:
    values = [value for _, value in curve.points if measured(value)]
    return f"{curve.title} from {curve.form(values[0])} to {curve.form(values[-1])}"
