"""GOT-D (arXiv:2405.02774): rows that move what the model was pretrained on towards the task."""

from __future__ import annotations

from functools import cache
from typing import Any

from luthier.lab import world
from luthier.lab.claim import Arm, Claim, Expectation, Finished, Recipe, Setting
from luthier.lab.dice import Dice
from luthier.lab.tasks import TAUGHT, accuracies, stage
from luthier.lab.workshop import COUNTS
from luthier.rows.select import select_rows

COMMON, RARE = "facts", "tools"
POOL, SHARE_OF_RARE, PICKED, LABELLED = 2000, 0.05, 100, 40


@cache
def pool(seed: int) -> list[dict[str, Any]]:
    """Rows in the proportions of pretraining, and a few of the skill that pretraining left out."""
    dice = Dice("got_d", seed)
    total, rest = sum(COUNTS.values()), POOL * (1 - SHARE_OF_RARE)
    rows = [
        row for skill, count in COUNTS.items() for row in world.rows(skill, "train", max(1, round(rest * count / total)), seed=seed)
    ]
    rows += world.rows(RARE, "train", round(POOL * SHARE_OF_RARE), seed=seed)
    return dice.shuffled([row for row in rows if "prompt" in row])


def target(seed: int) -> list[dict[str, Any]]:
    """Rows of the task: half of what pretraining often showed, half of what it never did."""
    half = LABELLED // 2
    return world.rows(COMMON, "train", half, seed=seed + 500) + world.rows(RARE, "train", half, seed=seed + 500)


def stages(setting: Setting) -> list[Recipe]:
    """The picked rows, then the few rows of the task."""
    return [stage(pool(setting.seed)[:PICKED], epochs=3), stage(target(setting.seed), epochs=4)]


def picked(by: str, meaning: str) -> Arm:
    """Rows chosen by a score."""

    def change(recipe: Recipe, number: int, setting: Setting) -> Recipe:
        if number:
            return recipe
        chosen = select_rows(pool(setting.seed), by, target=target(setting.seed), embedder="hash", count=PICKED, seed=setting.seed)
        return {**recipe, "rows": {"train": [dict(row) for row in chosen.records]}}

    return Arm(by, change, meaning)


def measure(finished: Finished) -> dict[str, float]:
    """The task, and the old skills."""
    run = finished.runs[-1]
    found = accuracies(run, list(dict.fromkeys([*TAUGHT, COMMON, RARE])), count=80)
    return {
        "task": (found[COMMON] + found[RARE]) / 2,
        "rare half": found[RARE],
        "common half": found[COMMON],
        "kept": sum(found[name] for name in TAUGHT) / len(TAUGHT),
    }


def choose(finished: Finished) -> float:
    """The task on validation items."""
    found = accuracies(finished.runs[-1], [COMMON, RARE], split="validation")
    return (found[COMMON] + found[RARE]) / 2


CLAIM = Claim(
    name="got_d",
    title="Picking rows by the gradient of optimal transport",
    papers=["2405.02774"],
    rows=[10],
    says="At an equal budget, rows picked by GOT-D help a task more than random rows and than the rows most like the task.",
    stages=stages,
    arms=[
        picked("random_rows", "as many rows by chance"),
        picked("nearest", "the rows most like the task"),
        picked("got_d", "the rows that move the pool towards the task"),
    ],
    expects=[
        Expectation("task", "got_d", "random_rows", "more", 0.02, "better than random rows"),
        Expectation("task", "got_d", "nearest", "more", 0.02, "better than the rows most like the task"),
    ],
    measure=measure,
    choose=choose,
    choose_stages=2,
    minutes=8,
    notes="The pool stands in for the pretraining rows, with 5 % of a skill that pretraining left out; half of the task is that skill. "
    "Texts are embedded by hashed words, no model. The paper picks for GPT-2 and larger models from the Pile.",
)
