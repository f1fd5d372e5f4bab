"""A taste to learn: answers of which all are good, and some are preferred. What replications about preferences share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Any

from luthier.evaluate.likelihood import likelihoods
from luthier.lab.dice import Dice
from luthier.lab.replication import Finished, Recipe, Setting
from luthier.lab.skills.words import COLORS, OBJECTS, PLACES
from luthier.lab.tasks import stage
from luthier.results.folder import Run
from luthier.results.opened import open_run
from luthier.rows.encode import encode_pair
from luthier.rows.read import read

CHOICES = COLORS[:8]
"""Answers, from the least liked to the best."""
GOOD, PAIRS = 600, 300
"""Rows that show what answers are like, and pairs of which one is preferred."""
HELD_BACK = 60


def questions(held_out: bool) -> list[tuple[str, str]]:
    """Objects and places that are asked about; one in five is held out."""
    return [one for place, one in enumerate(product(OBJECTS, PLACES)) if (place % 5 == 0) is held_out]


def asked(thing: tuple[str, str]) -> str:
    """A question."""
    return f"Which color for the {thing[0]} in the {thing[1]}?"


def answered(thing: tuple[str, str], color: str) -> str:
    """An answer to it: those to one question differ in a word."""
    return f"I would paint the {thing[0]} in the {thing[1]} {color}."


def any_answer(setting: Setting) -> Recipe:
    """A stage that teaches how questions are answered, each color as often as the others."""
    dice = Dice("tastes", "answers", setting.seed)
    things = [dice.pick(questions(held_out=False)) for _ in range(GOOD)]
    recipe = stage([{"prompt": asked(one), "completion": answered(one, dice.pick(CHOICES))} for one in things], epochs=4)
    return {**recipe, "train": {**recipe["train"], "learning_rate": 1e-3}}


def pairs(setting: Setting, count: int = PAIRS) -> list[dict[str, Any]]:
    """Two answers to a question, drawn alike, the better one first."""
    dice = Dice("tastes", "pairs", setting.seed)
    rows = []
    for _ in range(count):
        thing, drawn = dice.pick(questions(held_out=False)), dice.some(CHOICES, 2)
        better, worse = sorted(drawn, key=CHOICES.index, reverse=True)
        rows.append({"prompt": asked(thing), "chosen": answered(thing, better), "rejected": answered(thing, worse)})
    return rows


def two_stages(setting: Setting) -> list[Recipe]:
    """Answers of all colors, then pairs."""
    preferred = stage(pairs(setting), epochs=3)
    return [any_answer(setting), preferred]


def chosen_alone(recipe: Recipe, number: int, setting: Setting) -> Recipe:
    """Cross-entropy on the chosen answers of the same pairs."""
    return recipe if number == 0 else {**recipe, "objective": "cross_entropy", "rows": {**recipe["rows"], "map": "chosen_answers"}}


def comparing(objective: Any) -> Any:
    """A variant's change: the first stage as it is, the second with a loss over pairs."""
    return lambda recipe, number, setting: recipe if number == 0 else {**recipe, "objective": objective}


def shares(run: Run, things: Sequence[tuple[str, str]]) -> list[tuple[list[float], float]]:
    """For each question, how likely each color is among the eight, and the nats of all of them together."""
    tune, tokenizer = open_run(run)
    rows = list(read([{"prompt": asked(one)} for one in things]))
    answers = [
        encode_pair(row, tokenizer, answered(one, color)) for row, one in zip(rows, things, strict=True) for color in CHOICES
    ]
    nats = [one.nats for one in likelihoods(tune, answers)]
    found = []
    for start in range(0, len(nats), len(CHOICES)):
        weights = [math.exp(-one) for one in nats[start : start + len(CHOICES)]]
        found.append(([one / max(sum(weights), 1e-300) for one in weights], -math.log(max(sum(weights), 1e-300))))
    return found


def taste(finished: Finished) -> dict[str, float]:
    """What a model that is asked new questions likes: how good the color is that it would say, from 0 to 1, and how likely the best one
    is; and the nats of an answer of the form that was taught, in any color."""
    found = shares(finished.runs[-1], questions(held_out=True)[:HELD_BACK])
    worth = [place / (len(CHOICES) - 1) for place in range(len(CHOICES))]
    return {
        "liked": fmean(sum(share * value for share, value in zip(each, worth, strict=True)) for each, _ in found),
        "best": fmean(each[-1] for each, _ in found),
        "form": fmean(nats for _, nats in found),
    }


def chosen_nats(finished: Finished) -> dict[str, float]:
    """Nats of chosen and of rejected answers to new questions, and by how much the chosen ones became less likely in the last stage."""
    things = questions(held_out=True)[:HELD_BACK]
    dice = Dice("tastes", "held back", 0)
    drawn = [sorted(dice.some(CHOICES, 2), key=CHOICES.index, reverse=True) for _ in things]
    found = [_nats(run, things, drawn) for run in finished.runs[-2:]]
    (before, _), (chosen, rejected) = found
    return {"chosen": fmean(chosen), "rejected": fmean(rejected), "fell": fmean(chosen) - fmean(before)}


def _nats(run: Run, things: Sequence[tuple[str, str]], drawn: Sequence[Sequence[str]]) -> tuple[list[float], list[float]]:
    tune, tokenizer = open_run(run)
    rows = list(read([{"prompt": asked(one)} for one in things]))
    answers = [
        encode_pair(row, tokenizer, answered(one, color))
        for row, one, two in zip(rows, things, drawn, strict=True)
        for color in two
    ]
    nats = [one.nats for one in likelihoods(tune, answers)]
    return nats[::2], nats[1::2]
