"""Whose turn it is: the steps in which each technique may move, and how it counts them.

A phase in which one technique trains alone is no time for the others: their phases, searches and budgets are shares of the steps that
are left to them. All of it follows from the number of steps, so that a resumed run and every process have the same clocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from luthier.errors import LuthierError
from luthier.kinds import Freezing, Now

Span = tuple[int, int]
"""Steps of the run, from the first to the one behind the last."""


class _Plan(NamedTuple):
    """The turns of a run of so many steps."""

    spans: Mapping[str, Sequence[Span]]
    """The steps of a technique with a clock of its own."""
    borders: tuple[int, ...]
    """Steps with which a phase of any technique begins, other than the first."""
    restarts: tuple[int, ...]
    """Those with which the learning rate schedule begins again."""
    alone: Sequence[tuple[Span, str]]
    """Steps in which one technique trains alone."""


class Turns:
    """The clocks of a run's techniques.

    Where two want to train alone, the one that stands first in the run has its turn first.

    Args:
        phases: what each technique says of its phases, by slot, in the order in which they stand in the run.
        frees: the slots that free numbers. The others act on what these do, and their clock is the run's.
    """

    def __init__(self, phases: Mapping[str, Freezing] = {}, frees: Collection[str] = ()) -> None:
        self._phases, self._frees = dict(phases), frozenset(frees)
        self._plan = cache(self._make)

    def own(self, slot: str, now: Now) -> Now:
        """The clock of a technique, at a step of the run. Before its first step it shows that; after its last, the end."""
        spans = self._spans(slot, now.steps)
        if _length(spans) == now.steps:
            return now
        taken = sum(max(0, min(end, now.step) - begin) for begin, end in spans)
        return now._replace(step=taken, steps=max(1, _length(spans)))

    def moves(self, slot: str, now: Now) -> bool:
        """Whether this is one of its own steps."""
        spans = self._spans(slot, now.steps)
        return _length(spans) == now.steps or any(begin <= now.step < end for begin, end in spans)

    def alone(self, now: Now) -> str | None:
        """The technique that trains alone in this step, if any."""
        return next((slot for (begin, end), slot in self._plan(now.steps).alone if begin <= now.step < end), None)

    def first(self, slot: str, steps: int) -> int:
        """The step of the run that is the first of a technique's own."""
        return next((begin for begin, _ in self._spans(slot, steps)), 0)

    def borders(self, steps: int) -> tuple[int, ...]:
        """Steps of the run with which a phase of any technique begins, other than the first; in rising order."""
        return self._plan(steps).borders

    def check(self, steps: int) -> None:
        """Refuse a run that is too short.

        Raises:
            LuthierError: a phase with which the schedule begins again has no step.
        """
        for slot, value in self._phases.items():
            count = _length(self._spans(slot, steps))
            begins = [0, *value.borders(count), count]
            if value.restart and any(begin >= end for begin, end in pairwise(begins)):
                raise LuthierError(
                    f"a run of {steps} steps has {count} for `{slot}`, which are too few for its {len(begins) - 1} phases",
                    where=slot,
                    fix="train longer, or let its phases share the steps otherwise",
                )

    def restarts(self, steps: int) -> tuple[int, ...]:
        """Those with which the learning rate schedule begins again."""
        return self._plan(steps).restarts

    def _spans(self, slot: str, steps: int) -> Sequence[Span]:
        return self._plan(steps).spans.get(slot, ((0, steps),))

    def _make(self, steps: int) -> _Plan:
        spans: dict[str, Sequence[Span]] = dict.fromkeys(self._frees, ((0, steps),))
        borders: set[int] = set()
        restarts: set[int] = set()
        alone: list[tuple[Span, str]] = []
        settled: set[str] = set()
        # Those that train alone come first: the clocks of all others follow from theirs.
        for slot, value in sorted(self._phases.items(), key=lambda one: not one[1].alone):
            own = spans.get(slot, ((0, steps),))
            count = _length(own)
            ends = value.borders(count)
            begins = {_at(own, end) for end in ends if 0 < end < count}
            borders |= begins
            restarts |= begins if value.restart else set()
            settled.add(slot)
            for phase, (begin, end) in enumerate(pairwise([0, *ends, count])):
                if phase in value.alone:
                    mine = list(_part(own, begin, end))
                    alone += [(span, slot) for span in mine]
                    spans |= {other: _without(spans[other], mine) for other in self._frees - settled}
        return _Plan(spans, tuple(sorted(borders)), tuple(sorted(restarts)), alone)


def _length(spans: Sequence[Span]) -> int:
    return sum(end - begin for begin, end in spans)


def _at(spans: Sequence[Span], place: int) -> int:
    """The step of the run that is a technique's own step of this number."""
    before = [0, *accumulate(end - begin for begin, end in spans)]
    which = bisect_right(before, place) - 1
    return spans[which][0] + place - before[which]


def _part(spans: Sequence[Span], begin: int, end: int) -> Iterator[Span]:
    """Where a technique's own steps from one number to another lie in the run."""
    before = 0
    for left, right in spans:
        low, high = max(begin, before), min(end, before + right - left)
        if low < high:
            yield left + low - before, left + high - before
        before += right - left


def _without(spans: Sequence[Span], taken: Sequence[Span]) -> tuple[Span, ...]:
    left = list(spans)
    for low, high in taken:
        left = [piece for begin, end in left for piece in ((begin, min(end, low)), (max(begin, high), end)) if piece[0] < piece[1]]
    return tuple(left)
