"""The figure of a sweep: the new skill against forgetting, each variant's seeds as points around its numbered mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from luthier.report.svg import Element, Scale, add, figure, markup, ticks
from luthier.report.words import measured, percent

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 76, 616, 22, 284


class Point(NamedTuple):
    """One variant in the figure."""

    name: str
    target: Sequence[float | None]
    """Of each seed."""
    forgetting: Sequence[float | None]
    skill_mean: float | None
    forgetting_mean: float | None
    tuned: bool = True
    """Whether any learning rate taught it something; drawn hollow where none did."""

    @property
    def seeds(self) -> list[tuple[float, float]]:
        """The seeds that have both numbers."""
        pairs = zip(self.target, self.forgetting, strict=True)
        return [(skill, lost) for skill, lost in pairs if measured(skill) and measured(lost)]


def tradeoff_figure(variants: Sequence[Point], skill: str, form: Callable[[float], str], base: float | None = None) -> Markup:
    """Draw the variants, numbered from 1 in their order. Empty where no variant has both numbers.

    Args:
        variants: all of them; one without numbers keeps its number and is not drawn.
        skill: what the axis of the new skill says.
        form: how its values read.
        base: the new skill before training; none: not drawn.
    """
    everything = [pair for variant in variants for pair in variant.seeds]
    if not everything:
        return Markup("")
    untrained = [(base, 0.0)] if measured(base) else []
    across = _scale([lost for _, lost in [*everything, *untrained]], LEFT, RIGHT)
    upward = _scale([value for value, _ in [*everything, *untrained]], BOTTOM, TOP)
    svg = figure(WIDTH, HEIGHT, f"{skill} against forgetting; the numbers are those of the table", "tradeoff")
    _axes(svg, across, upward, skill, form)
    for value, lost in untrained:
        dot = add(svg, "circle", class_="dot before", cx=across.at(lost), cy=upward.at(value), r=5)
        add(dot, "title", f"before training: {form(value)}")
    for variant in variants:
        for value, lost in variant.seeds:
            dot = add(svg, "circle", class_="seed", cx=across.at(lost), cy=upward.at(value), r=4)
            add(dot, "title", f"{variant.name}: {form(value)}, forgot {percent(lost)}")
    for number, variant in enumerate(variants, start=1):
        if measured(variant.skill_mean) and measured(variant.forgetting_mean):
            x, y = across.at(variant.forgetting_mean), upward.at(variant.skill_mean)
            mean = add(svg, "g", class_="mean" if variant.tuned else "mean hollow")
            add(mean, "title", f"{variant.name}, mean: {form(variant.skill_mean)}, forgot {percent(variant.forgetting_mean)}")
            add(mean, "circle", cx=x, cy=y, r=10)
            add(mean, "text", str(number), x=x, y=y + 4, text_anchor="middle")
    return markup(svg)


def _scale(values: Sequence[float], start: float, stop: float) -> Scale:
    room = 0.12 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 0.1
    return Scale(min(values) - room, max(values) + room, start, stop)


def _axes(svg: Element, across: Scale, upward: Scale, skill: str, form: Callable[[float], str]) -> None:
    for value in ticks(across.low, across.high):
        x = across.at(value)
        add(svg, "line", class_="grid", x1=x, x2=x, y1=TOP, y2=BOTTOM)
        add(svg, "text", percent(value), class_="tick", x=x, y=BOTTOM + 17, text_anchor="middle")
    for value in ticks(upward.low, upward.high):
        y = upward.at(value)
        add(svg, "line", class_="grid", x1=LEFT, x2=RIGHT, y1=y, y2=y)
        add(svg, "text", form(value), class_="tick", x=LEFT - 8, y=y + 4, text_anchor="end")
    add(svg, "text", skill, class_="panel-title", x=8, y=12)
    add(svg, "text", "forgotten, of what was right before", class_="panel-title", x=RIGHT, y=HEIGHT - 10, text_anchor="end")
