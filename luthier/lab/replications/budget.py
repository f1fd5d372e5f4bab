"""Balancing the budget (arXiv:2502.11284): of so many rows that are paid for, how many show an answer and how many compare two."""

from __future__ import annotations

import re
from typing import Any

from luthier.evaluate.sets import measure as measure_sets
from luthier.lab import benchmark
from luthier.lab.benchmark_sets import sets_of
from luthier.lab.dice import Dice
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.replications.trace_noise import SKILL, spoiled
from luthier.lab.tasks import ITEMS, TAUGHT, mean, stage
from luthier.results.opened import open_run

BUDGET, EPOCHS = 200, 8
"""Rows in all, each of which costs the same, and passes over them in either stage."""
FORM = re.compile(r"\d+( \d+)* so \d+\.?")
"""How an answer with its steps is written."""


def comparison(row: dict[str, Any], dice: Dice) -> dict[str, Any]:
    """A right trace against one whose computation went wrong."""
    wrong = row
    while wrong["completion"] == row["completion"]:
        wrong = spoiled(row, "dynamic", dice)
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong["completion"]}


def stages(setting: Setting) -> list[Recipe]:
    """Demonstrations, then comparisons, each of all tasks; variants take their share from either end, so that no task is in both."""
    rows = benchmark.rows(SKILL, "train", BUDGET, seed=setting.seed)
    dice = Dice("budget", "pairs", setting.seed)
    shown = stage(rows, EPOCHS)
    shown["train"]["learning_rate"] = 3e-3
    compared = {**stage([comparison(row, dice) for row in rows], EPOCHS), "objective": {"dpo": {"beta": 1.0}}}
    return [shown, compared]


def spending(name: str, share: float) -> Variant:
    """So much of the budget on demonstrations, the rest on comparisons; a stage without rows is left out."""
    count = round(share * BUDGET)

    def change(recipe: Recipe, number: int, setting: Setting) -> Recipe | None:
        rows = recipe["rows"]["train"]
        part = rows[:count] if number == 0 else rows[count:]
        return {**recipe, "rows": {"train": part}} if part else None

    return Variant(name, change, f"{count} demonstrations, {BUDGET - count} comparisons")


def measure(finished: Finished) -> dict[str, float]:
    """Right answers, answers that are written as they were shown, and the old skills."""
    run = finished.runs[-1]
    (found,) = measure_sets(*open_run(run), sets_of([SKILL], split="held_out", count=ITEMS)).values()
    written = [FORM.fullmatch(item.answer.strip()) is not None for item in found.items]
    return {"right": found.value, "form": sum(written) / len(written), "kept": mean(run, TAUGHT)}


def choose(finished: Finished) -> float:
    """Judges a learning rate of the comparisons by right answers to other tasks."""
    return mean(finished.runs[-1], [SKILL], split="validation")


REPLICATION = Replication(
    name="budget",
    title="Demonstrations before comparisons, even if few",
    papers=["2502.11284"],
    rows=[142],
    says="A base model does not start to learn a task from comparisons alone; a tenth of the budget spent on demonstrations mends it, and "
    "a small budget is best spent on them whole.",
    stages=stages,
    variants=[
        # They have further to go from a base that has never met the task.
        spending("comparisons alone", 0.0)._replace(rates=(1e-4, 1e-3, 1e-2)),
        spending("a tenth shown", 0.1),
        spending("half shown", 0.5),
        spending("all shown", 1.0),
    ],
    main=Expectation("right", "a tenth shown", "comparisons alone", "more", 0.1, "a tenth of demonstrations gets it started"),
    also=[
        Expectation("form", "a tenth shown", "comparisons alone", "more", 0.2, "answers have the form"),
        Expectation("right", "all shown", "half shown", "not_less", 0.03, "all on demonstrations does as well as half"),
        Expectation("right", "half shown", "a tenth shown", "more", 0.05, "and half better than a tenth"),
    ],
    question="What do preferences teach?",
    measure=measure,
    choose=choose,
    choose_stages=2,
    rates=(1e-5, 1e-4, 1e-3),
    minutes=12,
    notes="The paper spends 100 to 20,000 rows on models of 1B to 14B parameters. Here it is 200, of running maxima with their steps; the "
    "wrong trace of a comparison has a fault in its computation. Beta is 1, as in the released settings. Demonstrations have one learning "
    "rate in all variants, that of comparisons is chosen in each; the growing share of comparisons in large budgets was not tried.",
)
