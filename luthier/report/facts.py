"""What a run's facts hold: its evaluation sets, and what became of every item. All views read this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from luthier.report.tasks import TaskFacts, settings_of, tasks_of
from luthier.report.words import (
    NOT_MEASURED,
    between,
    count,
    measured,
    number,
    percent,
    plural,
    points,
    shown,
    signed,
    spaced,
)

Facts = Mapping[str, Any]
"""What `run.json` holds."""

Change = Literal["lost", "learned", "wrong", "right"]
"""What became of one item: worse than before, better than before, or unchanged and wrong or right."""


class Estimate(NamedTuple):
    """A measured value and its 95 % interval; None where not measured."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def interval(self, form: Callable[[float], str]) -> str:
        """The interval in words; empty where there is none."""
        return between(self.low, self.high, form) if measured(self.low) and measured(self.high) else ""


class Sample(NamedTuple):
    """One item of an evaluation set, answered before and after."""

    set_name: str
    id: str
    prompt: str
    expected: str
    before: str
    after: str
    before_score: float
    after_score: float
    change: Change
    notes: tuple[str, str] = ("", "")
    """What was said of the answers before and after, such as a judge's reasons."""


class ClassFacts(NamedTuple):
    """One class, label or kind of entity, before and after; None where nothing was there, or named."""

    name: str
    n: int
    """How often it is there."""
    before: Mapping[str, float | None]
    """`precision`, `recall` and `f1`."""
    after: Mapping[str, float | None]


@dataclass(frozen=True)
class SetFacts:
    """One evaluation set, before against after."""

    name: str
    metric: str
    role: str
    """`target`: what training should teach; `retention`: what it should leave alone."""
    n: int | None
    before: Estimate
    after: Estimate
    difference: Estimate
    verdict: str
    """better, worse, no change, unclear or not measured."""
    note: str
    """Why, where the verdict needs words."""
    retained: float | None
    """Share of the items right before that are still right."""
    noise: float | None
    """Spread of repeated measurements of the base."""
    samples: tuple[Sample, ...]
    is_share: bool
    """Whether values are scores from 0 to 1, higher better; perplexity and loss are not."""
    right: tuple[int, int] | None
    """Items answered rightly before and after, where every item is right or wrong."""
    matters: float | None = None
    """The smallest change that matters."""
    classes: tuple[ClassFacts, ...] = ()
    """Of classes, labels or entities; empty for other metrics."""
    confusion: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By the right class, how many items were taken for which after training; empty where an item may have several."""
    tasks: tuple[TaskFacts, ...] = ()
    """Of the evaluation harness; empty for sets of rows."""
    settings: str = ""
    """How tasks were asked."""

    @property
    def form(self) -> Callable[[float], str]:
        """How a value reads."""
        return percent if self.is_share else number

    @property
    def difference_form(self) -> Callable[[float], str]:
        """How a difference reads: in percentage points for shares."""
        return points if self.is_share else signed

    @property
    def whole(self) -> tuple[float, float] | None:
        """The range a value can have, where it has two ends."""
        return (0.0, 1.0) if self.is_share else None

    def value(self, value: float | None) -> str:
        """A value of this set's metric in words."""
        return shown(value, self.form)

    def words(self) -> str:
        """Before and after in words: `58 of 60 right, 0 before` or `perplexity 12.3, 20.1 before`."""
        if self.right is not None:
            return f"{count(self.right[1])} of {plural(len(self.samples), 'item')} right, {count(self.right[0])} before"
        before, after = self.value(self.before.value), self.value(self.after.value)
        return f"{spaced(self.metric)} {after}, {before} before"

    @property
    def matters_words(self) -> str:
        """From what difference on a change matters, in words; empty where the run does not say."""
        return self.difference_form(self.matters).lstrip("+") if measured(self.matters) else ""

    def difference_words(self) -> str:
        """The difference in words."""
        return shown(self.difference.value, self.difference_form)


def sets_of(run: Facts) -> list[SetFacts]:
    """The evaluation sets of a run: what it should learn first, then what it should keep."""
    noise = run.get("repeat_baseline") or {}
    found = [_set_facts(name, entry or {}, noise.get(name)) for name, entry in (run.get("metrics") or {}).items()]
    return sorted(found, key=lambda one: one.role == "retention")


def samples_of(sets: list[SetFacts], change: Change) -> list[Sample]:
    """The items with one fate, of all sets; what was lost from `kept` sets comes first."""
    ordered = sorted(sets, key=lambda one: one.role != "retention") if change == "lost" else sets
    return [sample for one in ordered for sample in one.samples if sample.change == change]


def are_shares(values: Iterable[float | None], higher_is_better: bool) -> bool:
    """Whether values are scores from 0 to 1, which read best in percent."""
    return higher_is_better and all(value is None or 0 <= value <= 1 for value in values)


def short_name(run: Facts) -> str:
    """The name of a run's folder, else its recipe's name."""
    return PurePath(str(run.get("run") or run.get("name") or "unnamed")).name


def _set_facts(name: str, entry: Facts, noise: float | None) -> SetFacts:
    higher = bool(entry.get("higher_is_better", True))
    values = [entry.get("before"), entry.get("after")]
    is_share = are_shares(values, higher)
    # A judge, a task or a metric of your own may grade answers without an accepted one; where nothing is right or wrong, what changed
    # is shown.
    graded = higher and bool(entry.get("judge") or entry.get("own") or entry.get("benchmark"))
    items = [one for one in entry.get("items") or () if measured(one.get("before_score")) and measured(one.get("after_score"))]
    binary = all(one[key] in (0, 1) for one in items for key in ("before_score", "after_score"))
    samples = tuple(
        _sample(name, item)
        for item in (items if is_share or graded else ())
        # Without an expected answer nothing is right or wrong: there the answer alone was measured.
        if (binary or item["before_score"] != item["after_score"] if graded else item.get("expected"))
    )
    scores = [(sample.before_score, sample.after_score) for sample in samples]
    countable = bool(scores) and entry.get("is_mean", True) and all(score in (0, 1) for pair in scores for score in pair)
    countable = countable and (binary or not graded)
    return SetFacts(
        name=name,
        metric=str(entry.get("metric") or "metric"),
        role=str(entry.get("role") or "target"),
        n=entry.get("n"),
        before=_estimate(entry, "before"),
        after=_estimate(entry, "after"),
        difference=_estimate(entry, "difference"),
        verdict=str(entry.get("verdict") or NOT_MEASURED) if all(map(measured, values)) else NOT_MEASURED,
        note=str(entry.get("note") or ""),
        retained=entry.get("retained"),
        noise=noise,
        samples=samples,
        is_share=is_share,
        matters=entry.get("matters"),
        right=(sum(int(before) for before, _ in scores), sum(int(after) for _, after in scores)) if countable else None,
        classes=tuple(
            ClassFacts(name, one["n"], one["before"], one["after"]) for name, one in (entry.get("by_class") or {}).items()
        ),
        confusion=entry.get("confusion") or {},
        tasks=tasks_of(entry),
        settings=settings_of(entry),
    )


def _estimate(entry: Facts, key: str) -> Estimate:
    low, high = entry.get(f"{key}_interval") or (None, None)
    return Estimate(entry.get(key), low, high)


def _sample(set_name: str, item: Facts) -> Sample:
    before, after = item["before_score"], item["after_score"]
    change: Change = "right" if after == 1 else "wrong"
    if after != before:
        change = "learned" if after > before else "lost"
    expected = item.get("expected")
    return Sample(
        set_name,
        str(item.get("id", "")),
        _text(item.get("prompt")),
        " / ".join(map(str, expected)) if isinstance(expected, list) else _text(expected),
        _text(item.get("before")),
        _text(item.get("after")),
        before,
        after,
        change,
        (_text(item.get("before_note")), _text(item.get("after_note"))),
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)
