"""GOT-D (arXiv:2405.02774): rows that move what the model was pretrained on towards the task."""

from __future__ import annotations

from functools import cache
from typing import Any

from luthier.lab import benchmark
from luthier.lab.dice import Dice
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.skill import Split
from luthier.lab.tasks import TAUGHT, mean, stage
from luthier.lab.workshop import COUNTS
from luthier.rows.select import select_rows

RARE = "second_language"
POOL, SHARE_OF_RARE, PICKED, LABELLED = 2000, 0.05, 200, 60


def mixture(count: int, seed: int) -> list[dict[str, Any]]:
    """So many rows in the proportions of pretraining, or a few more."""
    total = sum(COUNTS.values())
    rows = [
        row
        for skill, share in COUNTS.items()
        for row in benchmark.rows(skill, "train", max(1, round(count * share / total)), seed=seed)
    ]
    return Dice("got_d", count, seed).shuffled([row for row in rows if "prompt" in row])


@cache
def pool(seed: int) -> list[dict[str, Any]]:
    """Rows as pretraining showed them, and a few of the skill that it left out."""
    rare = round(POOL * SHARE_OF_RARE)
    return Dice("got_d", seed).shuffled([*mixture(POOL - rare, seed), *benchmark.rows(RARE, "train", rare, seed=seed)])


def target(seed: int) -> list[dict[str, Any]]:
    """Rows of the task: half as in pretraining, half of what it left out."""
    return mixture(LABELLED // 2, seed + 500) + benchmark.rows(RARE, "train", LABELLED // 2, seed=seed + 500)


def stages(setting: Setting) -> list[Recipe]:
    """The picked rows, then the few rows of the task."""
    return [stage(pool(setting.seed)[:PICKED], epochs=10), stage(target(setting.seed), epochs=10)]


def picked(by: str, meaning: str) -> Variant:
    """Rows chosen by a score."""

    def change(recipe: Recipe, number: int, setting: Setting) -> Recipe:
        if number:
            return recipe
        chosen = select_rows(pool(setting.seed), by, target=target(setting.seed), embedder="hash", count=PICKED, seed=setting.seed)
        return {**recipe, "rows": {"train": [dict(row) for row in chosen.records]}}

    return Variant(by, change, meaning)


def task(finished: Finished, split: Split) -> dict[str, float]:
    """Both halves of the task."""
    run = finished.runs[-1]
    rare, common = mean(run, [RARE], split=split), mean(run, TAUGHT, split=split)
    return {"task": (common + rare) / 2, "rare half": rare, "common half": common}


REPLICATION = Replication(
    name="got_d",
    title="Picking rows by the gradient of optimal transport",
    papers=["2405.02774"],
    rows=[10],
    says="At an equal budget, rows picked by GOT-D help a task more than random rows and than the rows most like the task.",
    stages=stages,
    variants=[
        picked("random_rows", "as many rows by chance"),
        picked("nearest", "the rows most like the task"),
        picked("got_d", "the rows that move the pool towards the task"),
    ],
    main=Expectation("task", "got_d", "nearest", "more", 0.02, "better than the rows most like the task"),
    also=[
        Expectation("task", "got_d", "random_rows", "more", 0.02, "better than random rows"),
    ],
    question="Which rows and tokens are worth learning from?",
    measure=lambda finished: task(finished, "held_out"),
    choose=lambda finished: task(finished, "validation")["task"],
    choose_stages=2,
    minutes=8,
    notes="The pool stands in for the pretraining rows, with 5 % of a skill that pretraining left out; half of the task is that skill. "
    "Texts are embedded by hashed words, no model. The paper picks for GPT-2 and larger models from the Pile.",
)
