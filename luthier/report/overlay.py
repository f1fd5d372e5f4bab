"""The curves of several runs on one axis: the loss, and every evaluation set that two of them measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from luthier.report.curves import LEFT, MOST_SETS, RIGHT, WIDTH, Point, column, draw_line, set_points, thinned
from luthier.report.facts import Facts, SetFacts, sets_of
from luthier.report.svg import Element, Scale, add, figure, markup, ticks
from luthier.report.words import measured, number, percent, spaced

MOST_RUNS = 6
"""Runs that are drawn; each has a color and a pattern of its own in the style sheet."""
LETTER = 12
"""Pixels of a letter on a narrow window, where letters are drawn largest."""
HEIGHTS = {True: 170, False: 90}
"""Pixels of the loss, and of each evaluation set."""


class Panel(NamedTuple):
    """The same curve of every run."""

    title: str
    curves: tuple[Sequence[Point], ...]
    """By run; empty for one that has none."""
    form: Callable[[float], str]
    is_loss: bool = False


def overlay_figure(runs: Mapping[str, Facts]) -> Markup:
    """Draw the runs over each other, by optimizer step. Empty where fewer than two of them recorded steps.

    Args:
        runs: their facts, by what they are called.
    """
    drawn = dict(list(runs.items())[:MOST_RUNS])
    panels = [one for one in _panels(drawn) if sum(any(measured(value) for _, value in curve) for curve in one.curves) > 1]
    if not panels or not panels[0].is_loss:
        return Markup("")
    steps = [step for one in panels for curve in one.curves for step, _ in curve]
    across = Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    height = sum(HEIGHTS[one.is_loss] + 34 for one in panels) + 52
    svg = figure(WIDTH, height, f"{', '.join(one.title for one in panels)} of {', '.join(drawn)} over optimizer steps", "training")
    _legend(svg, list(drawn))
    top = 44.0
    for one in panels:
        _draw(svg, one, across, top, list(drawn))
        top += HEIGHTS[one.is_loss] + 34
    for tick in ticks(across.low, across.high, 8):
        add(svg, "text", f"{tick:,g}", class_="tick", x=across.at(tick), y=top - 14, text_anchor="middle")
    add(svg, "text", "optimizer step", class_="tick", x=across.stop, y=top + 4, text_anchor="end")
    return markup(svg)


def _panels(runs: Mapping[str, Facts]) -> list[Panel]:
    sets = [{one.name: one for one in sets_of(run)} for run in runs.values()]
    names = list(dict.fromkeys(name for found in sets for name in found))[:MOST_SETS]
    losses = tuple(thinned(column(run.get("history") or (), "loss"))[0] for run in runs.values())
    return [Panel("loss", losses, number, True), *(_set_panel(name, list(runs.values()), sets) for name in names)]


def _set_panel(name: str, runs: Sequence[Facts], sets: Sequence[Mapping[str, SetFacts]]) -> Panel:
    curves = tuple(set_points(run, found[name]) if name in found else () for run, found in zip(runs, sets, strict=True))
    first = next(found[name] for found in sets if name in found)
    return Panel(f"{name}, {spaced(first.metric)}", curves, percent if first.is_share else number)


def _legend(svg: Element, names: Sequence[str]) -> None:
    room = (WIDTH - LEFT - RIGHT) / len(names)
    most = max(2, int((room - 32) / LETTER))
    for place, name in enumerate(names):
        x = LEFT + place * room
        add(svg, "line", class_=f"curve run-{place}", x1=x, x2=x + 26, y1=12, y2=12)
        short = name if len(name) <= most else f"{name[: most - 1]}\u2026"
        add(svg, "text", short, x=x + 32, y=16)


def _draw(svg: Element, one: Panel, across: Scale, top: float, names: Sequence[str]) -> None:
    values = [value for curve in one.curves for _, value in curve if measured(value)]
    margin = 0.08 * (max(values) - min(values)) or 0.1 * abs(max(values)) or 1.0
    up = Scale(min(values) - margin, max(values) + margin, top + HEIGHTS[one.is_loss], top)
    for tick in ticks(up.low, up.high, 5 if one.is_loss else 3):
        add(svg, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=up.at(tick), y2=up.at(tick))
        text = percent(tick) if one.form is percent else f"{tick:,.12g}"
        add(svg, "text", text, class_="tick", x=LEFT - 8, y=up.at(tick) + 3.5, text_anchor="end")
    for place, curve in enumerate(one.curves):
        draw_line(svg, curve, across, up, f"curve run-{place}")
        for step, value in curve if not one.is_loss else ():
            if measured(value):
                dot = add(svg, "circle", class_=f"dot run-{place}", cx=across.at(step), cy=up.at(value), r=3.5)
                add(dot, "title", f"{names[place]}, {one.title}, step {step:g}: {one.form(value)}")
    add(svg, "text", one.title, class_="panel-title", x=LEFT, y=top - 8)
