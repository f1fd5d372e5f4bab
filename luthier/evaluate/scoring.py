"""How generated answers become scores: one by one, or all of a set at once where more is looked at than an answer and its accepted ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from luthier.errors import LuthierError, Say
from luthier.evaluate.items import accepted_answers
from luthier.rows.answers import Score
from luthier.rows.shapes import Row
from luthier.training.world import World


class Scored(NamedTuple):
    """What became of a set's answers."""

    scores: Sequence[float | None]
    """One an answer; None where none could be told, and the item is left out and named."""
    notes: Sequence[str] = ()
    """What was said of each answer, such as a judge's reasons; empty where nothing is."""
    told: Mapping[str, Any] = {}
    """What reports tell beside the value, as plain data."""


OfAnswers = Callable[[Sequence[str], Sequence[Row], Say], Scored]
"""Answers and their rows to scores; hears what is being done."""


class Scoring(NamedTuple):
    """What the options of a metric decide."""

    score: Score | None = None
    of_answers: OfAnswers | None = None
    readable: Callable[[str], bool] = lambda text: True
    """Whether an answer can be an accepted one."""
    sends: str = ""
    """Where answers are sent, in words; empty where they stay on this machine."""


class ScoringError(LuthierError):
    """Answers were generated and could not be scored: nothing is wrong with the model."""


def scored(scoring: Scoring, answers: Sequence[str], rows: Sequence[Row], say: Say) -> Scored:
    """Score the answers to rows, once, whatever the number of processes: a judge is paid for each question.

    Raises:
        ScoringError: in all processes, where they cannot be scored.
    """
    if scoring.of_answers is None:
        score = scoring.score
        assert score is not None
        return Scored([score(answer, accepted_answers(row)) for answer, row in zip(answers, rows, strict=True)])
    world = World.current()
    problem: LuthierError | None = None
    found: Scored | None = None
    if world.is_first:
        try:
            found = scoring.of_answers(answers, rows, say)
        except LuthierError as error:
            problem = error
    told = world.from_first((found, None if problem is None else (problem.what, problem.where, problem.fix)))
    found, refused = told
    if found is None:
        what, where, fix = refused or ("", "", "")
        raise ScoringError(what, where=where, fix=fix) from problem
    if all(score is None for score in found.scores):
        what = f"none of the {len(rows)} answers got a score"
        raise ScoringError(what, where=rows[0].place, fix=_first_note(found))
    return found


def _first_note(found: Scored) -> str:
    said = next((" ".join(note.split()) for note in found.notes if note.strip()), "")
    return f"what was said of the first: {said[:200]}" if said else "look at what the metric makes of an answer"
