"""LoRA against full fine-tuning (arXiv:2410.21228): what is learned, what is forgotten, and what the change looks like."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.tasks import TAUGHT, mean, teach, validation
from luthier.runs.probe import probe

SKILL = "second_language"
FASTER = (1e-3, 3e-3, 1e-2)
"""What trains less takes larger steps: LoRA's grid is the other's, moved up by one."""


def stages(setting: Setting) -> list[Recipe]:
    """One new skill."""
    return [teach(SKILL, setting, count=600, epochs=15)]


def measure(finished: Finished) -> dict[str, float]:
    """The new skill, the old ones, and intruder dimensions for each matrix of the blocks."""
    run = finished.runs[0]
    found = probe("intruder_dimensions", str(run.folder)).numbers
    return {
        "learnt": mean(run, [SKILL]),
        "kept": mean(run, TAUGHT),
        "intruders per matrix": found["intruders"] / found["matrices"],
    }


REPLICATION = Replication(
    name="lora",
    title="LoRA learns less and forgets less than full fine-tuning, and brings intruder dimensions",
    papers=["2410.21228"],
    rows=[24],
    says="LoRA's low-rank change brings large singular vectors unlike any of the base, full fine-tuning's does not; LoRA forgets less.",
    stages=stages,
    variants=[
        Variant("full", {"tune": {"full": {}}}, "every matrix trains"),
        Variant("lora, rank 8", {"tune": {"lora": {"rank": 8}}}, "a change of rank 8 beside each matrix", rates=FASTER),
        Variant("lora, rank 1", {"tune": {"lora": {"rank": 1}}}, "a change of rank 1", rates=FASTER),
    ],
    main=Expectation("intruders per matrix", "lora, rank 8", "full", "more", 0.1, "LoRA brings intruders, full does not"),
    also=[
        Expectation("intruders per matrix", "lora, rank 1", "full", "more", 0.1, "so does LoRA of rank 1"),
        Expectation("kept", "lora, rank 8", "full", "more", 0.02, "LoRA forgets less"),
        Expectation("learnt", "lora, rank 8", "full", "not_more", 0.05, "LoRA does not learn more"),
    ],
    question="Is it enough to train some of the numbers?",
    measure=measure,
    choose=validation(SKILL),
    unit="a matrix",
    floor={"learnt": 0.3},
    minutes=8,
    notes="The paper's first version says LoRA with intruders forgets more, the later ones that it forgets less: the later are tested. "
    "Intruders: among the ten largest left singular vectors, those whose cosine with every vector of the base is below 0.5.",
)
