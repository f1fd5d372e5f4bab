"""Noise in traces (arXiv:2402.04004): faults in the text against faults in the computation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from luthier.lab import benchmark
from luthier.lab.dice import Dice
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.tasks import TAUGHT, mean, stage, validation

SKILL, COUNT, EPOCHS, LENGTH = "largest", 200, 8, 4
DYNAMIC = 0.15
"""Chance that a step's result is wrong."""
NUMBERS = tuple(range(1, 10))


def another(number: int, dice: Dice) -> int:
    """A wrong number."""
    return dice.pick([one for one in NUMBERS if one != number])


def dynamic(numbers: Sequence[int], chance: float, dice: Dice) -> list[int]:
    """The running maximum where each step may come out wrong, and what follows builds on it; without chance the clean trace."""
    steps: list[int] = []
    for number in numbers:
        largest = max([number, *steps[-1:]])
        steps.append(another(largest, dice) if dice.chance(chance) else largest)
    return steps


def static(steps: Sequence[int], chance: float, dice: Dice) -> list[int]:
    """A finished trace where each number may be replaced."""
    return [another(step, dice) if dice.chance(chance) else step for step in steps]


def wrong_numbers(steps: Sequence[int], clean: Sequence[int]) -> int:
    """Numbers of a trace that differ from those of the clean one."""
    return sum(one != other for one, other in zip(steps, clean, strict=True))


@cache
def static_intensity() -> float:
    """The chance of a wrong number at which static noise leaves as many in a trace as the dynamic noise does."""
    dice = Dice("trace noise")
    asked = [[dice.pick(NUMBERS) for _ in range(LENGTH)] for _ in range(2000)]
    found = sum(wrong_numbers(dynamic(one, DYNAMIC, dice), dynamic(one, 0.0, dice)) for one in asked)
    # Of static noise every number is wrong with this very chance.
    return round(found / (LENGTH * len(asked)), 3)


def stages(setting: Setting) -> list[Recipe]:
    """Clean traces."""
    return [stage(benchmark.rows(SKILL, "train", COUNT, seed=setting.seed), EPOCHS)]


def spoiled(row: dict[str, Any], kind: str, dice: Dice) -> dict[str, Any]:
    """A row with noise in its trace; static noise leaves the answer behind it right, dynamic noise does not."""
    numbers = [int(one) for one in row["prompt"].removeprefix("Largest of ").removesuffix(".").split(", ")]
    clean = dynamic(numbers, 0.0, dice)
    steps = dynamic(numbers, DYNAMIC, dice) if kind == "dynamic" else static(clean, static_intensity(), dice)
    answer = steps[-1] if kind == "dynamic" else clean[-1]
    return {**row, "completion": f"{' '.join(map(str, steps))} so {answer}"}


def noisy(kind: str) -> Variant:
    """Every trace spoiled."""

    def change(recipe: Recipe, number: int, setting: Setting) -> Recipe:
        dice = Dice("trace noise", kind, setting.seed)
        return {**recipe, "rows": {"train": [spoiled(row, kind, dice) for row in recipe["rows"]["train"]]}}

    return Variant(kind, change, "all traces with faults in the " + ("computation" if kind == "dynamic" else "finished text"))


def measure(finished: Finished) -> dict[str, float]:
    """Right answers to clean questions, and the old skills."""
    run = finished.runs[0]
    return {"right": mean(run, [SKILL]), "kept": mean(run, TAUGHT)}


REPLICATION = Replication(
    name="trace_noise",
    title="Noise in traces: faults in the text and faults in the computation",
    papers=["2402.04004"],
    rows=[225],
    says="Fine-tuning bears much noise in the text of a trace, and little noise that spreads through its computation.",
    stages=stages,
    variants=[Variant("clean", {}, "right traces"), noisy("static"), noisy("dynamic")],
    main=Expectation("right", "dynamic", "static", "less", 0.1, "it hurts more, with as many wrong numbers"),
    also=[
        Expectation("right", "static", "clean", "not_less", 0.1, "noise in the text is borne"),
        Expectation("right", "dynamic", "clean", "less", 0.1, "noise in the computation hurts"),
    ],
    question="Which rows and tokens are worth learning from?",
    measure=measure,
    choose=validation(SKILL),
    rates=(1e-3, 2e-3, 4e-3),
    floor={"right": 0.5},
    minutes=8,
    notes="The running maximum of four numbers, since sums of four are beyond a model of this size; the paper's are sums. The two "
    "noises are matched by the expected number of wrong numbers in a trace, which the paper does not do: a fault in the computation spoils "
    "what follows, so at one intensity more of the trace is wrong.",
)
