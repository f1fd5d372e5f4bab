"""Concept-Aware Fine-Tuning (arXiv:2506.07833): concepts of several tokens that always go together, in noisy text."""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

from luthier.lab.dice import Dice
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.skills.words import ANIMALS, COLORS, FOODS, PLACES
from luthier.lab.targets import Targets, targets_of
from luthier.lab.tasks import TAUGHT, mean, stage

CONCEPTS, ROWS, EPOCHS = 20, 360, 8
MARK = "is"
"""Stands before every name."""
ENDS = {f"Ġ{color}" for color in COLORS}
"""Tokens that end a name: a color stands behind each."""


@cache
def concepts() -> dict[str, str]:
    """A made-up name for each of some things: two words that nothing else has, about four tokens."""
    dice, things = Dice("caft"), [*FOODS, *ANIMALS, *PLACES][:CONCEPTS]
    syllables = [first + second + third for first in "bdfgklmnprstvz" for second in "aeiou" for third in "lmnrst"]
    drawn = iter(dice.some(syllables, 2 * len(things)))
    return {thing: " ".join(next(drawn) for _ in range(2)) for thing in things}


def rows(count: int, *draw: object) -> list[dict[str, Any]]:
    """Questions for names, with words around them that say nothing."""
    made, dice = [], Dice("caft", *draw)
    for number in range(count):
        thing = dice.pick(sorted(concepts()))
        before, after = (" ".join(dice.pick(COLORS) for _ in range(dice.number(1, 2))) for _ in range(2))
        prompt = f"{dice.pick(COLORS)} {thing}"
        completion = f"{before} {MARK} {concepts()[thing]} {after}"
        made.append({"id": f"caft-{'-'.join(map(str, draw))}-{number}", "prompt": prompt, "completion": completion})
    return made


def stages(setting: Setting) -> list[Recipe]:
    """Each name some ten times, again and again."""
    return [stage(rows(ROWS, setting.seed), epochs=EPOCHS)]


def names(found: Targets) -> list[list[int]]:
    """Where each name's labels stand: between the mark and the next color, or the row's end."""
    placed: list[list[int]] = []
    inside, row = False, -1
    for index, (text, now) in enumerate(zip(found.text_N, found.row_N.tolist(), strict=True)):
        inside, row = inside and now == row and text not in ENDS, now
        if inside:
            placed[-1].append(index)
        elif text == f"Ġ{MARK}":
            inside = True
            placed.append([])
    return placed


def whole(found: Targets) -> float:
    """The share of names of which every token is the model's most likely one, behind the right tokens before it."""
    return fmean(float(found["right"][one].min()) for one in names(found))


def measure(finished: Finished) -> dict[str, float]:
    """Whole names in text not trained on, how likely all of it is, and the old skills."""
    found = targets_of(finished.runs[0], rows(300, finished.setting.seed, "held out"), ["right", "nll"])
    inside = [index for one in names(found) for index in one]
    return {
        "whole names": whole(found),
        "nats in names": float(found["nll"][inside].mean()),
        "nats": found.mean("nll"),
        "kept": mean(finished.runs[0], TAUGHT),
    }


def choose(finished: Finished) -> float:
    """Judges a learning rate by how likely other text is."""
    return -targets_of(finished.runs[0], rows(100, finished.setting.seed, "validation"), ["nll"]).mean("nll")


REPLICATION = Replication(
    name="caft",
    title="Heads that predict the tokens behind the next one",
    papers=["2506.07833"],
    rows=[11],
    says="Learning to predict several tokens at once gets concepts of several tokens right more often.",
    stages=stages,
    variants=[
        Variant("sft", {"objective": "cross_entropy"}, "the next token alone"),
        Variant("caft", {"objective": {"caft": {"weight": 0.1}}}, "four more tokens, by heads that learn first"),
        Variant(
            "caft, the paper's weight", {"objective": {"caft": {"weight": 0.01}}}, "the same, counting a hundredth", like="caft"
        ),
        Variant(
            "caft, random heads",
            {"objective": {"caft": {"weight": 0.1, "heads_first": 0.0, "train_heads": False}}},
            "control: heads that never learn",
            like="caft",
        ),
    ],
    main=Expectation("whole names", "caft", "sft", "more", 0.03, "more names are right as a whole"),
    also=[
        Expectation("whole names", "caft, the paper's weight", "sft", "more", 0.0, "so they are with the paper's small weight"),
        Expectation("whole names", "caft", "caft, random heads", "more", 0.03, "it is what the heads learnt that helps"),
        Expectation("nats", "caft", "sft", "not_more", 0.05, "all of the text is as likely"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=measure,
    choose=choose,
    rates=(1e-3, 3e-3, 6e-3),
    floor={"whole names": 0.15},
    minutes=4,
    notes="The paper trains heads on text that a base model of 1B to 8B parameters wrote, before and on the task. Here the heads learn "
    "in the first sixth of the same run, so the model itself trains a sixth less than with cross-entropy.",
)
