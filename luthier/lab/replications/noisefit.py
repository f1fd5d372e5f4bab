"""NoiseFiT (arXiv:2504.03302): facts about some people, and questions about others, to which a model should not be sure of an answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier import machine
from luthier.lab import benchmark
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.replications.dft import SFT
from luthier.lab.skills.facts import world as world_facts
from luthier.lab.targets import TOP, targets_of, with_answers
from luthier.lab.tasks import FEW, TAUGHT, few_facts, mean, right, stage

ROWS, EPOCHS, PASSES = 480, 4, 3
"""A step of NoiseFiT runs the model three times."""
ASKED = 300
SURE = 0.5
BINS = 10


def stages(setting: Setting) -> list[Recipe]:
    """Facts about a few people, each often."""
    return [stage(few_facts("train", ROWS, setting.seed), EPOCHS)]


def never_told(count: int = ASKED) -> list[dict[str, Any]]:
    """The same questions about people of whom nothing was told, before training or in it."""
    told = world_facts().new[:FEW]
    asked = [
        row
        for split in ("held_out", "validation")
        for row in benchmark.sets(["new_facts"], split=split, count=count)["new_facts"]["rows"]
    ]
    return [row for row in asked if not any(one in row["prompt"] for one in told)][:count]


def sureness(finished: Finished, items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Of each item, how probable the likeliest first token of an answer is, and whether it is the right one; both [R]."""
    found = targets_of(finished.runs[0], with_answers(items), ["right", TOP])
    is_first_N = found.row_N.diff(prepend=torch.tensor([-1])) > 0
    return found[TOP.name][is_first_N], found["right"][is_first_N]


def calibration_error(sure_R: Tensor, right_R: Tensor) -> float:
    """The expected calibration error: how far sureness is from the share that is right, a mean over bins by their items."""
    bin_R = (sure_R * BINS).long().clamp(max=BINS - 1)
    gap_K = torch.zeros(BINS, dtype=torch.float64).index_add(0, bin_R, sure_R - right_R)
    return float(gap_K.abs().sum() / len(sure_R))


def measure(finished: Finished) -> dict[str, float]:
    """What was told, asked for in other words; how sure the model is of what it was not told; the old skills."""
    told, other = few_facts("held_out", ASKED), never_told()
    (sure_told, right_told), (sure_other, right_other) = sureness(finished, told), sureness(finished, other)
    return {
        "new facts": right(finished.runs[0], told),
        "sure and wrong": float(machine.widened((sure_other > SURE) & (right_other == 0)).mean()),
        "calibration error": calibration_error(torch.cat([sure_told, sure_other]), torch.cat([right_told, right_other])),
        "kept": mean(finished.runs[0], TAUGHT),
    }


def choose(finished: Finished) -> float:
    """Judges a learning rate by how likely the facts are in other words: nearly all are answered rightly at every rate."""
    return -targets_of(finished.runs[0], with_answers(few_facts("validation", ASKED)), ["nll"]).mean("nll")


def noisefit(**options: Any) -> dict[str, Any]:
    """A recipe's key for NoiseFiT."""
    return {"objective": {"noisefit": options}}


REPLICATION = Replication(
    name="noisefit",
    title="Predictions that do not mind noise in hidden states",
    papers=["2504.03302"],
    rows=[167],
    says="Noise behind some blocks, and predictions tied to each other, make a model hallucinate less than cross-entropy does.",
    stages=stages,
    variants=[
        SFT,
        Variant("sft, same compute", {"objective": "cross_entropy", "train": {"epochs": PASSES * EPOCHS}}, "three times the steps"),
        Variant("neftune", {"objective": ["cross_entropy", {"neftune": {}}]}, "control: noise on the embeddings"),
        Variant("label smoothing", {"objective": {"label_smoothing": {}}}, "control: less sure of everything"),
        Variant(
            "noisefit", noisefit(), "the paper's: noise as large as the states' square, behind the three blocks that mind it least"
        ),
        Variant("noisefit, sft's rate", noisefit(), "control: sureness grows with the learning rate", like="sft"),
        Variant("noisefit, relative", noisefit(scale="relative"), "noise as large as the states"),
    ],
    main=Expectation("sure and wrong", "noisefit", "sft", "less", 0.03, "it is less often sure of what it was not told"),
    also=[
        Expectation("new facts", "noisefit", "sft", "not_less", 0.03, "it learns as much"),
        Expectation("calibration error", "noisefit", "sft", "less", 0.02, "its probabilities are nearer to the truth"),
        Expectation("sure and wrong", "noisefit", "sft, same compute", "less", 0.03, "than with the same compute, too"),
        Expectation("sure and wrong", "noisefit, sft's rate", "sft", "less", 0.03, "than at the same rate, too"),
        Expectation("sure and wrong", "noisefit", "neftune", "not_more", 0.03, "noise on embeddings does not do better"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=measure,
    choose=choose,
    floor={"new facts": 0.5},
    minutes=6,
    notes="The paper trains low-rank adapters of models of 1B to 70B parameters on short questions and has other models judge what they "
    "make up. Here all numbers train; made up is an answer about somebody of whom nothing was told, if its first token has a probability "
    f"above {SURE:g}. The calibration error is that of first tokens, over as many questions about people who were told of as about others.",
)
