"""Masked thought (arXiv:2403.02178): part of the trace is hidden from the model while it learns to write it."""

from __future__ import annotations

from luthier.lab import benchmark
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.targets import targets_of
from luthier.lab.tasks import TAUGHT, mean, teach, validation

SKILL = "largest"


def stages(setting: Setting) -> list[Recipe]:
    """Few traces, many times: where plain training learns them by heart."""
    return [teach(SKILL, setting, count=100, epochs=10)]


def measure(finished: Finished) -> dict[str, float]:
    """Right last numbers, for lists as long as those trained on and for longer ones; where the last block looks."""
    run = finished.runs[0]
    other = benchmark.rows(SKILL, "train", 60, seed=finished.setting.seed + 500)
    return {
        "as long": mean(run, [SKILL]),
        "one longer": mean(run, [SKILL], difficulty=2),
        "two longer": mean(run, [SKILL], difficulty=3),
        "attention to the question": targets_of(run, other, ["context_attention"]).mean("context_attention"),
        "kept": mean(run, TAUGHT),
    }


def masked(rate: float) -> Variant:
    """Up to a share of the trace replaced."""
    recipe = {"objective": ["cross_entropy", {"masked_thought": {"mask_probability": rate}}]}
    return Variant(f"masked, {rate:g}", recipe, f"up to {rate:.0%} of the trace replaced")


REPLICATION = Replication(
    name="masked_thought",
    title="Hiding part of the reasoning while learning it",
    papers=["2403.02178"],
    rows=[14],
    says="Replacing random tokens of the reasoning in the input, with the targets left whole, raises accuracy by about 5 points.",
    stages=stages,
    variants=[
        Variant("plain", {"objective": "cross_entropy"}, "cross-entropy on the whole trace"),
        masked(0.2),
        masked(0.4),
        masked(0.8),
    ],
    main=Expectation("one longer", "masked, 0.4", "plain", "more", 0.03, "better on longer lists"),
    also=[
        Expectation("as long", "masked, 0.4", "plain", "more", 0.03, "better on lists as long as those trained on"),
        Expectation("attention to the question", "masked, 0.4", "plain", "more", 0.0, "it looks more at the question"),
        Expectation("as long", "masked, 0.8", "masked, 0.4", "less", 0.0, "too much hidden is worse"),
    ],
    question="Which rows and tokens are worth learning from?",
    measure=measure,
    choose=validation(SKILL),
    rates=(5e-4, 1e-3, 2e-3),
    floor={"as long": 0.5},
    minutes=4,
    notes="The paper fine-tunes 7B models on GSM8K for ten epochs, with a rate of 0.4. Here a trace is the running maximum of a list: "
    "each step can be read from the question alone, or from the step before and one number of the question.",
)
