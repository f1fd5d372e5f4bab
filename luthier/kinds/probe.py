"""What happened inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from luthier.kinds.parts import Place

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.kinds.parts import Parts


class Comparison(Protocol):
    """What a probe may ask for: a base and what was tuned from it, one weight at a time.

    Weights come as [O, I] for a linear however it is stored, in fp32 or wider where the model is.
    """

    parts: Parts

    @property
    def changed(self) -> Sequence[Place]:
        """The places that hold other numbers than in the base, in the model's order; tied weights once."""

    def base(self, place: Place) -> Tensor:
        """The values before."""

    def change(self, place: Place) -> Tensor:
        """What tuning added: low-rank deltas as exactly as their factors tell."""

    def tuned(self, place: Place) -> Tensor:
        """The values after: `base(place) + change(place)`."""


Cell = str | int | float | None
"""What a row of a table may hold."""

Table = Sequence[Mapping[str, Cell]]
"""Rows with the same columns."""


class Line(NamedTuple):
    """One line of a drawing, with a dot at each point where `dots`."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


class Drawing(NamedTuple):
    """A figure as plain data: lines over one axis."""

    title: str
    across: str
    """What the horizontal axis shows."""
    up: str
    lines: Sequence[Line]


class Finding(NamedTuple):
    """What a probe found: plain data, which every view shows."""

    sentence: str
    numbers: Mapping[str, float]
    """Totals, by name."""
    rows: Table
    """The table: one row for each thing compared."""
    tables: Mapping[str, Table] = {}
    """More tables, by title."""
    figure: Drawing | None = None
    notes: Sequence[str] = ()
    """What was left out, and why."""

    def as_json(self) -> dict[str, Any]:
        """The same for scripts."""
        drawing = self.figure and {**self.figure._asdict(), "lines": [line._asdict() for line in self.figure.lines]}
        return {**self._asdict(), "figure": drawing}


class Probe(NamedTuple):
    """What happened inside? `look(comparison)` turns a base and what was tuned from it into a table, a figure and one sentence."""

    look: Callable[[Comparison], Finding]
