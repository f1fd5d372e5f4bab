"""Direct Coverage Optimization (arXiv:2502.07154): training for one of many samples to be right, briefly and for long."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.targets import TOP, Targets, answered, targets_of
from luthier.lab.tasks import TAUGHT, mean, teach

SKILL, HARD, ROWS, SHORT, LONG = "arithmetic", 2, 300, 5, 20
SAMPLES = (1, 16, 256)
ITEMS = {"held_out": 150, "validation": 100}
"""Of each split; there are few different tasks of this difficulty, and fewer are kept to judge rates by."""


def stages(setting: Setting) -> list[Recipe]:
    """Few rows, many times: the model becomes sure of answers to people it was not asked about."""
    return [teach(SKILL, setting, count=ROWS, epochs=LONG, difficulty=HARD)]


def items(finished: Finished, split: Any = "held_out") -> Targets:
    """Right answers under the run's model."""
    return targets_of(finished.runs[0], answered([SKILL], split=split, count=ITEMS[split], difficulty=HARD), ["nll", TOP])


def measure(finished: Finished) -> dict[str, float]:
    """The chance that one of N samples is right, exact since there is one right answer; how sure the model is; the old skills."""
    found = items(finished)
    return {
        **{f"pass@{samples}": found.coverage(samples) for samples in SAMPLES},
        "top probability": found.mean("top"),
        "kept": mean(finished.runs[0], TAUGHT),
    }


def choose(finished: Finished) -> float:
    """Judges a learning rate by the mean over all N."""
    found = items(finished, "validation")
    return fmean(found.coverage(samples) for samples in SAMPLES)


def covering(samples: int) -> Variant:
    """DCO for so many samples."""
    return Variant(f"dco, {samples}", {"objective": {"dco": {"samples": samples}}}, f"for one of {samples} samples to be right")


REPLICATION = Replication(
    name="dco",
    title="Limiting confidence for the sake of many samples",
    papers=["2502.07154"],
    rows=[193],
    says="Long training with cross-entropy lowers the chance that one of many samples is right; training for that chance raises it.",
    stages=stages,
    variants=[
        Variant("ce", {"objective": "cross_entropy"}, f"cross-entropy, {LONG} times over the rows"),
        Variant("ce, short", {"objective": "cross_entropy", "train": {"epochs": SHORT}}, f"{SHORT} times", like="ce"),
        covering(16),
        covering(256),
    ],
    main=Expectation("pass@256", "dco, 256", "ce", "more", 0.02, "trained for 256 samples, they hold the answer more often"),
    also=[
        Expectation("pass@256", "ce", "ce, short", "less", 0.02, "longer training costs coverage"),
        Expectation("pass@1", "ce", "ce, short", "more", 0.02, "and makes one answer better"),
        Expectation("pass@16", "dco, 16", "ce", "more", 0.02, "trained for 16 samples, they do, too"),
        Expectation("pass@1", "ce", "dco, 256", "more", 0.02, "for one sample cross-entropy is better"),
        Expectation("top probability", "dco, 256", "ce", "less", 0.1, "the model is less sure"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=measure,
    choose=choose,
    floor={"pass@1": 0.1},
    minutes=5,
    notes="The paper fine-tunes Llama 3 8B on competition mathematics and proves theorems. Here answers are one or two tokens, so a row's "
    "probability is that of its answer, and pass@N follows from it without sampling.",
)
