"""Drawing in SVG: scales, ticks, marks. Colors come from the page's style sheet by class, to follow light and dark.

Everything is drawn with `xml.etree`, which escapes text and attributes; nothing joins markup as strings.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

from luthier.report.words import clean

Element = ElementTree.Element


class Scale(NamedTuple):
    """Maps values from `low` to `high` onto pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """The pixel of a value, to a hundredth; the middle where all values are one."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.stop - self.start), 2)


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, `most` at most, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        step = power * factor
        # A range that ends on a tick keeps it, in spite of rounding.
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def figure(width: float, height: float, label: str, class_: str) -> Element:
    """An empty figure; `label` is what a screen reader says."""
    box = f"0 0 {width:g} {height:g}"
    return Element("svg", {"class": class_, "viewBox": box, "role": "img", "aria-label": clean(label)})


def add(parent: Element, tag: str, text: str | None = None, /, **attributes: str | float) -> Element:
    """Draw one mark. Attributes are named as in Python: `class_`, `text_anchor`."""
    named = {name.rstrip("_").replace("_", "-"): _attribute(value) for name, value in attributes.items()}
    child = ElementTree.SubElement(parent, tag, named)
    child.text = None if text is None else clean(text)
    return child


def markup(svg: Element) -> Markup:
    """The finished figure, for a template."""
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _attribute(value: str | float) -> str:
    return clean(value) if isinstance(value, str) else f"{value:g}"
