"""What a run's facts say: evaluation sets, samples, headline, cards. The page and the terminal both read this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from luthier.report.words import (
    NOT_MEASURED,
    between,
    count,
    duration,
    measured,
    number,
    percent,
    plural,
    points,
    short,
    shown,
    signed,
    size,
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


@dataclass(frozen=True)
class SetFacts:
    """One evaluation set, before against after."""

    name: str
    metric: str
    side: str
    """`learnt`: what training should teach; `kept`: what it should leave alone."""
    n: int | None
    before: Estimate
    after: Estimate
    difference: Estimate
    verdict: str
    """better, worse, no change or not measured."""
    note: str
    """Why, where the verdict needs words."""
    kept: float | None
    """Share of the items right before that are still right."""
    noise: float | None
    """Spread of repeated measurements of the base."""
    samples: tuple[Sample, ...]
    is_share: bool
    """Whether values are scores from 0 to 1, higher better; perplexity and loss are not."""
    right: tuple[int, int] | None
    """Items answered rightly before and after, where every item is right or wrong."""

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

    def difference_words(self) -> str:
        """The difference in words."""
        return shown(self.difference.value, self.difference_form)


class Card(NamedTuple):
    """One of the four: what was learned, kept, changed, and what it cost."""

    title: str
    value: str
    notes: tuple[str, ...]
    verdict: str = ""
    """Colors the card; empty where there is nothing to judge."""


def sets_of(run: Facts) -> list[SetFacts]:
    """The evaluation sets of a run: what it should learn first, then what it should keep."""
    noise = run.get("noise") or {}
    found = [_set_facts(name, entry or {}, noise.get(name)) for name, entry in (run.get("metrics") or {}).items()]
    return sorted(found, key=lambda one: one.side == "kept")


def samples_of(sets: list[SetFacts], change: Change) -> list[Sample]:
    """The items with one fate, of all sets; what was lost from `kept` sets comes first."""
    ordered = sorted(sets, key=lambda one: one.side != "kept") if change == "lost" else sets
    return [sample for one in ordered for sample in one.samples if sample.change == change]


def headline(run: Facts) -> str:
    """One sentence that says what happened."""
    sets = sets_of(run)
    if run.get("status") == "finished":
        parts = [*_learned_words(sets), *_kept_words(run, sets)]
    else:
        parts = [_unfinished_words(run), "what it learned and kept is not measured"]
    trained, total = run.get("trained_numbers"), run.get("total_numbers")
    if measured(trained) and measured(total) and total:
        parts.append(f"{percent(trained / total)} of {short(total)} numbers trained")
    if measured(run.get("seconds")):
        parts.append(duration(run["seconds"]))
    return f"{_capital('; '.join(parts))}."


def cards(run: Facts) -> tuple[Card, Card, Card, Card]:
    """What was learned, what was kept, what changed, and what it cost."""
    sets = sets_of(run)
    return _learned_card(sets), _kept_card(run, sets), _changed_card(run), _cost_card(run)


def warnings_of(run: Facts) -> list[str]:
    """What a reader must know before believing the rest."""
    found = [] if run.get("status") == "finished" else [f"{_capital(_unfinished_words(run))}."]
    found += [str(one) for one in run.get("warnings") or ()]
    for name, shared in ((run.get("rows") or {}).get("overlap") or {}).items():
        if shared:
            found.append(
                f"{plural(shared, 'item')} of {name} also stand in the training rows: gains there prove nothing."
            )
    losses = [line.get("loss") for line in run.get("history") or ()]
    broken = sum(loss is not None and not measured(loss) for loss in losses)
    if broken:
        found.append(f"The loss was not finite in {plural(broken, 'step')}.")
    return found


def are_shares(values: Iterable[float | None], higher_is_better: bool) -> bool:
    """Whether values are scores from 0 to 1, which read best in percent."""
    return higher_is_better and all(value is None or 0 <= value <= 1 for value in values)


def short_name(run: Facts) -> str:
    """The name of a run's folder, else its recipe's name."""
    return PurePath(str(run.get("run") or run.get("name") or "unnamed")).name


def last_step(run: Facts) -> int:
    """Optimizer steps that were recorded."""
    history = run.get("history") or ()
    return int(history[-1]["step"]) if history else 0


def _set_facts(name: str, entry: Facts, noise: float | None) -> SetFacts:
    higher = bool(entry.get("higher_is_better", True))
    values = [entry.get("before"), entry.get("after")]
    is_share = are_shares(values, higher)
    items = entry.get("items") or () if is_share else ()
    samples = tuple(
        _sample(name, item)
        for item in items
        if measured(item.get("before_score")) and measured(item.get("after_score"))
    )
    scores = [(sample.before_score, sample.after_score) for sample in samples]
    countable = bool(scores) and all(score in (0, 1) for pair in scores for score in pair)
    return SetFacts(
        name=name,
        metric=str(entry.get("metric") or "metric"),
        side=str(entry.get("side") or "learnt"),
        n=entry.get("n"),
        before=_estimate(entry, "before"),
        after=_estimate(entry, "after"),
        difference=_estimate(entry, "difference"),
        verdict=str(entry.get("verdict") or NOT_MEASURED) if all(map(measured, values)) else NOT_MEASURED,
        note=str(entry.get("note") or ""),
        kept=entry.get("kept"),
        noise=noise,
        samples=samples,
        is_share=is_share,
        right=(sum(int(before) for before, _ in scores), sum(int(after) for _, after in scores)) if countable else None,
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
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _unfinished_words(run: Facts) -> str:
    how = {"failed": "this run failed", "stopped": "this run was stopped", "running": "this run is not finished"}
    words = how.get(str(run.get("status")), f"the state of this run is {run.get('status') or 'unknown'}")
    step = last_step(run)
    return f"{words} after {plural(step, 'step')}" if step else f"{words}; no step was recorded"


def _learned_words(sets: list[SetFacts]) -> list[str]:
    learnt = [one for one in sets if one.side != "kept"]
    if not learnt:
        return ["what it learned is not measured"]
    said = {"better": "learned {}: {}", "worse": "got worse at {}: {}", "no change": "no change shown on {}: {}"}
    parts = [
        said[one.verdict].format(one.name, one.words()) if one.verdict in said else f"{one.name} is not measured"
        for one in learnt[:2]
    ]
    return [*parts, f"{plural(len(learnt) - 2, 'more set')} below"] if len(learnt) > 2 else parts


def _kept_words(run: Facts, sets: list[SetFacts]) -> list[str]:
    kept = [one for one in sets if one.side == "kept" and one.verdict != NOT_MEASURED]
    share = run.get("kept")
    parts = [f"{percent(share)} of what it answered rightly before is kept"] if measured(share) else []
    parts += [f"{one.name} got worse: {one.words()}" for one in kept if one.verdict == "worse"]
    if not parts and kept:
        parts = ["nothing that should be kept got measurably worse"]
    return parts or ["what it kept is not measured"]


def _learned_card(sets: list[SetFacts]) -> Card:
    learnt = [one for one in sets if one.side != "kept"]
    if not learnt:
        return Card("Learned", NOT_MEASURED, ("no set to learn was evaluated",))
    first = learnt[0]
    value = (
        f"{count(first.right[1])} of {count(len(first.samples))}"
        if first.right is not None
        else first.value(first.after.value)
    )
    before = count(first.right[0]) if first.right is not None else first.value(first.before.value)
    notes = (f"{first.name}, {spaced(first.metric)}", f"{before} before; {first.verdict}")
    others = tuple(f"{one.name}: {one.value(one.after.value)}, {one.verdict}" for one in learnt[1:3])
    return Card("Learned", value, notes + others, first.verdict)


def _kept_card(run: Facts, sets: list[SetFacts]) -> Card:
    kept = [one for one in sets if one.side == "kept"]
    if not kept:
        return Card("Kept", NOT_MEASURED, ("no set to keep was evaluated",))
    verdict = "worse" if any(one.verdict == "worse" for one in kept) else ""
    if measured(run.get("kept")):
        lost = sum(sample.change == "lost" for one in kept for sample in one.samples)
        notes = ("of what was right before", f"{plural(lost, 'item')} lost")
        rest = tuple(f"{one.name}: {one.verdict}" for one in kept if not one.is_share)
        return Card("Kept", percent(run["kept"]), notes + rest[:2], verdict)
    first = kept[0]
    words = (f"{first.name}, {spaced(first.metric)}", f"{first.value(first.before.value)} before; {first.verdict}")
    return Card("Kept", first.value(first.after.value), words, verdict)


def _changed_card(run: Facts) -> Card:
    delta = run.get("delta") or {}
    trained, total = run.get("trained_numbers"), run.get("total_numbers")
    notes = []
    if measured(trained):
        notes.append(f"{short(trained)} of {shown(total, short)} numbers trained")
    if measured(delta.get("relative")):
        notes.append(f"moved by {percent(delta['relative'])} of the base's norm")
    return Card("Changed", shown(delta.get("changed_share"), percent), tuple(notes))


def _cost_card(run: Facts) -> Card:
    notes = []
    if measured(run.get("supervised_tokens_per_second")):
        notes.append(f"{number(run['supervised_tokens_per_second'])} supervised tokens/s")
    if measured(run.get("peak_memory_bytes")) and run["peak_memory_bytes"]:
        notes.append(f"{size(run['peak_memory_bytes'])} at the peak")
    return Card("Cost", shown(run.get("seconds"), duration), tuple(notes))
