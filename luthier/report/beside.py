"""Two runs on the same items, by the test that every report uses, and their answers side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from luthier.evaluate.items import Item
from luthier.evaluate.paired import difference_of, recorded, value_of, verdict_of
from luthier.report.facts import Estimate


class Versus(NamedTuple):
    """A run beside another: its value after training minus the other's."""

    difference: Estimate
    p_value: float
    verdict: str
    """better, worse, no change, unclear or not measured, as in a run's own report."""
    note: str

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        value, low, high = self.difference
        interval = None if low is None else [low, high]
        return {"difference": value, "interval": interval, "p_value": self.p_value, "verdict": self.verdict, "note": self.note}


class Answers(NamedTuple):
    """What each run answered to one item."""

    set_name: str
    id: str
    prompt: str
    expected: str
    answers: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def differs(self) -> bool:
        """Whether the runs did not do equally well."""
        return len(set(self.scores)) > 1


def identity(item: Mapping[str, Any]) -> str:
    """What makes an item of `run.json` the same in two runs: its id, prompt and expected answer."""
    return json.dumps([item.get(key) for key in ("id", "prompt", "expected")], ensure_ascii=False, default=str)


def aligned(entries: Sequence[Mapping[str, Any]]) -> list[list[Item]] | None:
    """The items of several runs' entries of one set, which must be the same, in one order; None where one kept too little of them."""
    found = [recorded(entry) for entry in entries]
    known = [items for items in found if items is not None]
    if len(known) < len(found):
        return None
    return [
        [item for _, item in sorted(zip(map(identity, entry["items"]), items, strict=True), key=lambda pair: pair[0])]
        for items, entry in zip(known, entries, strict=True)
    ]


def versus(metric: str, other: Sequence[Item], one: Sequence[Item], noise: float | None, higher_is_better: bool = True) -> Versus:
    """A run beside another on the same items, in the same order.

    Args:
        metric: what was measured.
        other: the items of the other run, which is what is compared with.
        one: those of the run.
        noise: what repeating the measurement changes; None where that was not measured.
        higher_is_better: of a metric of your own.
    """
    difference = difference_of(metric, other, one, higher_is_better=higher_is_better)
    verdict, note = verdict_of(difference, metric, value_of(metric, other), len(one), noise, higher_is_better=higher_is_better)
    return Versus(Estimate(difference.value, *(difference.interval or ())), difference.p_value, verdict, note)


def answers_of(name: str, items: Sequence[Sequence[Item]]) -> list[Answers]:
    """What the runs answered, item by item: those first at which they did not do equally well. None where a likelihood was measured."""
    rows = [
        Answers(
            name,
            together[0].id,
            together[0].prompt,
            " / ".join(together[0].expected) if isinstance(together[0].expected, list) else together[0].expected,
            tuple(item.answer for item in together),
            tuple(item.score for item in together),
        )
        for together in zip(*items, strict=True)
    ]
    return sorted((row for row in rows if any(row.answers)), key=lambda row: not row.differs)
