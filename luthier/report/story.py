"""What a run's facts say in words: the headline, the four cards, the warnings. Page and terminal share it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from luthier.evaluate.overlap import warnings_about
from luthier.report.facts import Facts, SetFacts, samples_of, sets_of
from luthier.report.words import (
    NOT_MEASURED,
    count,
    duration,
    measured,
    number,
    percent,
    plural,
    short,
    shown,
    size,
    spaced,
)


class Card(NamedTuple):
    """One of the four: what was learned, kept, changed, and what it cost."""

    title: str
    value: str
    notes: tuple[str, ...]
    verdict: str = ""
    """Colors the card; empty where there is nothing to judge."""


def headline(run: Facts) -> str:
    """One sentence that says what happened."""
    sets = sets_of(run)
    parts = [] if run.get("status") == "finished" else [_unfinished_words(run)]
    parts += [*_learned_words(sets), *_kept_words(run, sets)]
    trained, total = run.get("trained_parameters"), run.get("total_parameters")
    if measured(trained) and measured(total) and total:
        parts.append(f"{percent(trained / total)} of {short(total)} parameters trained")
    if measured(run.get("seconds")):
        parts.append(duration(run["seconds"]))
    return f"{_capital('; '.join(parts))}."


def cards(run: Facts) -> tuple[Card, Card, Card, Card]:
    """What was learned, what was kept, what changed, and what it cost."""
    sets = sets_of(run)
    return _learned_card(sets), _kept_card(run, sets), _changed_card(run), _cost_card(run)


def warnings_of(run: Facts) -> list[str]:
    """What a reader must know before believing the rest."""
    found = [] if run.get("status") == "finished" else [f"{_capital(_unfinished_words(run))}.{_how_it_goes_on(run)}"]
    found += [str(one) for one in run.get("warnings") or ()]
    found += warnings_about((run.get("rows") or {}).get("overlap") or {})
    losses = [line.get("loss") for line in run.get("history") or ()]
    broken = sum(loss is not None and not measured(loss) for loss in losses)
    if broken:
        found.append(f"The loss was not finite in {plural(broken, 'step')}.")
    return found


class Warned(NamedTuple):
    """A warning, and which of several runs say it."""

    text: str
    runs: tuple[str, ...]
    of: int
    """How many runs there are."""

    @property
    def who(self) -> str:
        """Which runs, in words."""
        if len(self.runs) == self.of:
            return "every run"
        more = [f"{len(self.runs) - MOST_NAMED} more"] if len(self.runs) > MOST_NAMED else []
        return ", ".join([*self.runs[:MOST_NAMED], *more])


MOST_NAMED = 4
"""Runs that a warning names one by one."""


def gathered(runs: Mapping[str, Facts]) -> list[Warned]:
    """The warnings of several runs, each once.

    Args:
        runs: their facts, by what they are called.
    """
    said: dict[str, list[str]] = {}
    for name, run in runs.items():
        for text in dict.fromkeys(warnings_of(run)):
            said.setdefault(text, []).append(name)
    return [Warned(text, tuple(names), len(runs)) for text, names in said.items()]


def last_step(run: Facts) -> int:
    """Optimizer steps that were recorded."""
    history = run.get("history") or ()
    return int(history[-1]["step"]) if history else 0


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _unfinished_words(run: Facts) -> str:
    step, of = last_step(run), run.get("planned_steps")
    if run.get("status") == "running":
        return f"this run is under way: {count(step)} of {plural(of, 'step')} taken" if of else "this run is under way"
    how = {"failed": "this run failed", "stopped": "this run was stopped", "crashed": "this run crashed"}
    words = how.get(str(run.get("status")), f"the state of this run is {run.get('status') or 'unknown'}")
    return f"{words} after {plural(step, 'step')}" if step else f"{words}; no step was recorded"


def _how_it_goes_on(run: Facts) -> str:
    """What continues a run that ended before its time; empty for any other."""
    if run.get("status") in ("stopped", "crashed") and run.get("run"):
        return f" `luthier train --resume {run['run']}` goes on."
    return ""


def _learned_words(sets: list[SetFacts]) -> list[str]:
    learnt = [one for one in sets if one.role != "retention"]
    if not learnt:
        return ["what it learned is not measured"]
    parts = [_verdict_words(one) for one in learnt[:2]]
    return [*parts, f"{plural(len(learnt) - 2, 'more set')} below"] if len(learnt) > 2 else parts


def _verdict_words(one: SetFacts) -> str:
    if not (measured(one.before.value) and measured(one.after.value)):
        return f"{one.name} is not measured"
    said = {"better": "learned", "worse": "got worse on", "no change": "no change on", "unclear": "unclear on"}
    return f"{said.get(one.verdict, 'no verdict on')} {one.name}: {one.words()}"


def _kept_words(run: Facts, sets: list[SetFacts]) -> list[str]:
    kept = [one for one in sets if one.role == "retention"]
    share = run.get("retained")
    parts = [f"{percent(share)} of what it answered rightly before is kept"] if measured(share) else []
    # A share alone would hide a set that got worse, or one that nobody measured.
    for verdict, words in (("worse", "got worse on {}"), (NOT_MEASURED, "{} not measured")):
        such = [one for one in kept if one.verdict == verdict]
        parts += [_verdict_words(one) for one in such[:2]]
        parts += [words.format(plural(len(such) - 2, "more set") + " below")] if len(such) > 2 else []
    if not parts and kept:
        unclear = [one.name for one in kept if one.verdict == "unclear"]
        parts = [f"whether it got worse on {', '.join(unclear[:2])} is unclear"] if unclear else []
    if not parts and kept:
        parts = ["nothing that should be kept got measurably worse"]
    return parts or ["what it kept is not measured"]


def _learned_card(sets: list[SetFacts]) -> Card:
    learnt = [one for one in sets if one.role != "retention"]
    if not learnt:
        return Card("Target", NOT_MEASURED, ("no set to learn was evaluated",))
    first = learnt[0]
    value = f"{count(first.right[1])} of {count(len(first.samples))}" if first.right is not None else first.value(first.after.value)
    before = count(first.right[0]) if first.right is not None else first.value(first.before.value)
    notes = (f"{first.name}, {spaced(first.metric)}", f"{before} before; {first.verdict}")
    others = tuple(f"{one.name}: {one.value(one.after.value)}, {one.verdict}" for one in learnt[1:3])
    return Card("Target", value, notes + others, first.verdict)


def _kept_card(run: Facts, sets: list[SetFacts]) -> Card:
    kept = [one for one in sets if one.role == "retention"]
    if not kept:
        return Card("Retention", NOT_MEASURED, ("no set to keep was evaluated",))
    verdict = "worse" if any(one.verdict == "worse" for one in kept) else ""
    if measured(run.get("retained")):
        lost = len(samples_of(kept, "lost"))
        notes = ("of what was right before", f"{plural(lost, 'item')} lost")
        rest = tuple(f"{one.name}: {one.verdict}" for one in kept if not one.is_share)
        return Card("Retention", percent(run["retained"]), notes + rest[:2], verdict)
    first = kept[0]
    words = (f"{first.name}, {spaced(first.metric)}", f"{first.value(first.before.value)} before; {first.verdict}")
    return Card("Retention", first.value(first.after.value), words, verdict)


def _changed_card(run: Facts) -> Card:
    delta = run.get("delta") or {}
    trained, total = run.get("trained_parameters"), run.get("total_parameters")
    notes = []
    if measured(trained):
        notes.append(f"{short(trained)} of {shown(total, short)} parameters trained")
    if measured(delta.get("relative")):
        notes.append(f"moved by {percent(delta['relative'])} of the base's norm")
    share = trained / total if measured(trained) and measured(total) and total else None
    return Card("Changed", shown(share, percent), tuple(notes))


def _cost_card(run: Facts) -> Card:
    notes = [f"and {duration(run['measuring_seconds'])} of measuring"] if measured(run.get("measuring_seconds")) else []
    if measured(run.get("supervised_tokens_per_second")):
        notes.append(f"{number(run['supervised_tokens_per_second'])} supervised tokens/s")
    if measured(run.get("peak_memory_bytes")) and run["peak_memory_bytes"]:
        notes.append(f"{size(run['peak_memory_bytes'])} at the peak")
    return Card("Cost", shown(run.get("seconds"), duration), tuple(notes))
