"""Anchored SFT (arXiv:2509.23753): DFT and cross-entropy, each with and without an anchor, on reasoning and on new facts."""

from __future__ import annotations

from statistics import fmean

from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.replications.dft import DFT, SFT
from luthier.lab.targets import answered, drift
from luthier.lab.tasks import TAUGHT, few_facts, mean, right, stage, teach

REASONING, LONGER = "largest", 3
"""Lists of six numbers are asked for, and of four trained on: on those nearly every answer is right."""
ANCHOR = {"kl": {"weight": 0.05}}


def stages(setting: Setting) -> list[Recipe]:
    """Each by itself: a skill with its steps written out, and facts that nothing known leads to."""
    return [
        teach(REASONING, setting, count=120, epochs=8),
        stage(few_facts("train", 480, setting.seed), epochs=4),
    ]


def measure(finished: Finished) -> dict[str, float]:
    """Both tasks, how far each took the model from the base on old items, and the old skills behind either."""
    reasoning, knowledge = finished.runs
    old = answered(TAUGHT, count=40)
    return {
        "reasoning": mean(reasoning, [REASONING], difficulty=LONGER),
        "new facts": right(knowledge, few_facts("held_out")),
        "drift": fmean(drift(run, old) for run in finished.runs),
        "kept": fmean(mean(run, TAUGHT) for run in finished.runs),
    }


def choose(finished: Finished) -> float:
    """Judges a learning rate by both tasks."""
    reasoning, knowledge = finished.runs
    return fmean([mean(reasoning, [REASONING], split="validation", difficulty=LONGER), right(knowledge, few_facts("validation"))])


REPLICATION = Replication(
    name="asft",
    title="DFT with an anchor, on reasoning and on new facts",
    papers=["2509.23753"],
    rows=[99],
    says="DFT learns no facts and drifts from the base; with a KL anchor it learns better than DFT and cross-entropy and stays near.",
    stages=stages,
    variants=[
        SFT,
        DFT,
        Variant("sft, anchored", {"objective": ["cross_entropy", ANCHOR]}, "control: the anchor without DFT"),
        Variant("asft", {"objective": "asft"}, "DFT and KL to the base, 0.05"),
    ],
    main=Expectation("reasoning", "asft", "sft", "more", 0.03, "it reasons better than cross-entropy"),
    also=[
        Expectation("new facts", "asft", "dft", "more", 0.05, "the anchor helps it to"),
        Expectation("reasoning", "asft", "dft", "not_less", 0.03, "it reasons as well as dft"),
        Expectation("new facts", "dft", "sft", "less", 0.1, "dft does not learn facts"),
        Expectation("drift", "asft", "dft", "less", 0.0, "it stays nearer to the base than dft"),
        Expectation("drift", "asft", "sft, anchored", "not_more", 0.02, "as near as cross-entropy with the anchor"),
        Expectation("kept", "asft", "sft", "more", 0.02, "it keeps more of what was known"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=measure,
    choose=choose,
    choose_stages=2,
    apart=True,
    floor={"reasoning": 0.3, "new facts": 0.5},
    minutes=6,
    notes="The paper fine-tunes 7B models on 10,000 to 100,000 rows of mathematics and medicine. The drift is measured on items of what "
    "the model knew before, a mean over both tasks. Reasoning is asked for on longer lists than those trained on.",
)
