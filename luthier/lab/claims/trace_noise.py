"""Noise in traces (arXiv:2402.04004): faults in the text against faults in the computation."""

from __future__ import annotations

from functools import cache

from luthier.lab.claim import Arm, Claim, Expectation, Finished, Recipe, Setting
from luthier.lab.dice import Dice
from luthier.lab.skills.arithmetic import dynamic, running_sum, static, written
from luthier.lab.tasks import TAUGHT, mean, teach, validation

COUNT, EPOCHS, LENGTH = 600, 4, 4
DYNAMIC = 0.15
"""Chance that a step's result is wrong."""


def wrong_numbers(text: str, clean: str) -> int:
    """Numbers of a trace that differ from those of the clean one."""
    numbers = [[part for line in trace.split() for part in line.replace("+", "=").split("=")] for trace in (text, clean)]
    return sum(one != other for one, other in zip(*numbers, strict=True))


@cache
def static_intensity() -> float:
    """The chance of a wrong digit at which static noise leaves as many wrong numbers in a trace as the dynamic noise does."""
    dice = Dice("trace noise")
    sums = [[dice.number(1, 9) for _ in range(LENGTH)] for _ in range(400)]
    clean = [written(running_sum(numbers)) for numbers in sums]
    wanted = sum(wrong_numbers(written(dynamic(numbers, DYNAMIC, dice)), text) for numbers, text in zip(sums, clean, strict=True))
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        dice = Dice("trace noise", "static")
        found = sum(wrong_numbers(static(text, middle, dice), text) for text in clean)
        low, high = (middle, high) if found < wanted else (low, middle)
    return round(low, 3)


def stages(setting: Setting) -> list[Recipe]:
    """Clean traces."""
    return [teach("traces", setting, count=COUNT, epochs=EPOCHS)]


def noisy(kind: str) -> Arm:
    """Every trace spoiled."""

    def change(recipe: Recipe, number: int, setting: Setting) -> Recipe:
        intensity = DYNAMIC if kind == "dynamic" else static_intensity()
        return {**recipe, **teach("traces", setting, count=COUNT, epochs=EPOCHS, noise=1.0, kind=kind, intensity=intensity)}

    return Arm(kind, change, "all traces with faults in the " + ("computation" if kind == "dynamic" else "finished text"))


def measure(finished: Finished) -> dict[str, float]:
    """Right answers to clean questions, and the old skills."""
    run = finished.runs[0]
    return {"right": mean(run, ["traces"], count=150), "kept": mean(run, TAUGHT)}


CLAIM = Claim(
    name="trace_noise",
    title="Noise in traces: faults in the text and faults in the computation",
    papers=["2402.04004"],
    rows=[225],
    says="Fine-tuning bears much noise in the text of a trace, and little noise that spreads through its computation.",
    stages=stages,
    arms=[Arm("clean", {}, "right traces"), noisy("static"), noisy("dynamic")],
    expects=[
        Expectation("right", "static", "clean", "not_less", 0.1, "noise in the text is borne"),
        Expectation("right", "dynamic", "clean", "less", 0.1, "noise in the computation hurts"),
        Expectation("right", "dynamic", "static", "less", 0.1, "it hurts more, with as many wrong numbers"),
    ],
    measure=measure,
    choose=validation("traces"),
    rates=(1e-3, 2e-3, 4e-3),
    floor={"right": 0.5},
    minutes=8,
    notes="Sums of four numbers. The two noises are matched by the expected number of wrong numbers in a trace, which the paper does "
    "not do: a fault in the computation spoils all that follows, so at one intensity more of the trace is wrong.",
)
