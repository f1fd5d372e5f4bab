"""Masked thought (arXiv:2403.02178): part of the trace is hidden from the model while it learns to write it."""

from __future__ import annotations

from luthier.lab.claim import Arm, Claim, Expectation, Finished, Recipe, Setting
from luthier.lab.tasks import TAUGHT, mean, teach, validation


def stages(setting: Setting) -> list[Recipe]:
    """Few traces, many times: where plain training learns them by heart."""
    return [teach("traces", setting, count=100, epochs=12)]


def measure(finished: Finished) -> dict[str, float]:
    """Right last numbers, for sums as long as those trained on and for longer ones."""
    run = finished.runs[0]
    return {
        "as long": mean(run, ["traces"], count=150),
        "one longer": mean(run, ["traces"], count=150, difficulty=2),
        "kept": mean(run, TAUGHT),
    }


CLAIM = Claim(
    name="masked_thought",
    title="Hiding part of the reasoning while learning it",
    papers=["2403.02178"],
    rows=[14],
    says="Replacing random tokens of the reasoning in the input, with the targets left whole, raises accuracy by about 5 points.",
    stages=stages,
    arms=[
        Arm("plain", {"objective": "cross_entropy"}, "cross-entropy on the whole trace"),
        Arm("masked, 0.4", {"objective": [{"masked_thought": {"rate": 0.4}}]}, "up to 40 % of the trace replaced"),
    ],
    expects=[
        Expectation("as long", "masked, 0.4", "plain", "more", 0.03, "better on sums as long as those trained on"),
        Expectation("one longer", "masked, 0.4", "plain", "more", 0.03, "better on longer sums"),
    ],
    measure=measure,
    choose=validation("traces"),
    rates=(1e-3, 2e-3, 4e-3),
    floor={"as long": 0.5},
    minutes=10,
    notes="The paper fine-tunes 7B models on GSM8K for ten epochs, with a rate of 0.4. Each step of our traces writes both operands "
    "again, so there is little a model could copy from afar.",
)
