"""Generated answers as items: their scores, what was said of them, and of rows with a label which class each names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.errors import Say
from luthier.evaluate.choose import Chosen
from luthier.evaluate.items import Item, accepted_answers, prompt_text
from luthier.evaluate.scoring import Scored, scored
from luthier.recipe.schema import plain
from luthier.rows.answers import Score
from luthier.rows.shapes import Row

OTHER = "(no label)"
"""What a generated answer is told as that names no label of the set."""
_MOST_LABELS = 100
"""A set with more is not told class by class: its labels are texts like any other answers."""


def answered(chosen: Chosen, answers: Sequence[str], rows: Sequence[Row], say: Say) -> tuple[list[Item], dict[str, Any]]:
    """Answers as items, without those that got no score, and what reports tell beside them.

    Args:
        chosen: the set's metric.
        answers: to the rows.
        rows: all of the set.
        say: hears what is being done.

    Raises:
        ScoringError: they cannot be scored.
    """
    compares, scoring = chosen.metric.compares, chosen.scoring
    found = scored(scoring, answers, rows, say)
    shown = compares or scoring.of_answers is not None
    score = scoring.score if compares else None
    labels = list(dict.fromkeys(label for row in rows for label in _labels(row)))
    labels = labels if len(labels) <= _MOST_LABELS else []
    items, unscored = [], []
    notes = found.notes or [""] * len(rows)
    for row, answer, value, note in zip(rows, answers, found.scores, notes, strict=True):
        if value is None:
            unscored.append({"id": row.id, "answer": answer, "note": note})
            continue
        accepted = accepted_answers(row)
        expected = (accepted[0] if len(accepted) == 1 else accepted) if shown and accepted else ""
        counts = _counts(answer, _labels(row), labels, score) if labels and score is not None else {}
        items.append(Item(row.id, prompt_text(row), expected, answer, value, counts=counts, note=note))
    return items, {**_told(chosen, found), **({"unscored": unscored} if unscored else {})}


def _told(chosen: Chosen, found: Scored) -> dict[str, Any]:
    """What reports tell of the metric beside its name."""
    own = {"higher_is_better": chosen.metric.higher_is_better} if chosen.code else {}
    return {**found.told, **({"options": plain(chosen.options)} if chosen.options else {}), **own}


def _labels(row: Row) -> list[str]:
    """The one class that a row's answer names; nothing where it has none, or several labels."""
    label = row.fields["label"] if row.shape == "text+label" else None
    return [str(label)] if isinstance(label, str | int) else []


def _counts(answer: str, right: Sequence[str], labels: Sequence[str], score: Score) -> dict[str, tuple[int, int, int]]:
    """Of the right class and the one that a generated answer names: how often it is there, is named, and both."""
    # The right one first: an answer may count as several, and then it is not wrong.
    said = next((label for label in [*right, *labels] if score(answer, [label]) == 1.0), OTHER)
    return {
        label: (int(label in right), int(label == said), int(label in right and label == said))
        for label in dict.fromkeys([*right, said])
    }
