"""CorDA (arXiv:2406.05223): directions that the facts to keep do not use."""

from __future__ import annotations

from typing import Any

from luthier.lab import benchmark
from luthier.lab.benchmark_sets import stored
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.tasks import FASTER, mean, teach, validation

SKILL = "sort"
RANK = 8


def stages(setting: Setting) -> list[Recipe]:
    """A skill that has nothing to do with facts."""
    return [teach(SKILL, setting, count=800, epochs=8)]


def preserving(recipe: Recipe, number: int, setting: Setting) -> Recipe:
    """Looks at questions about facts first."""
    facts = stored("facts", benchmark.rows("facts", "train", 256, seed=setting.seed))
    options: dict[str, Any] = {"rank": RANK, "mode": "knowledge_preserved", "calibration_source": str(facts)}
    return {**recipe, "tune": {"corda": options}}


def measure(finished: Finished) -> dict[str, float]:
    """The new skill and the facts."""
    run = finished.runs[0]
    return {"learnt": mean(run, [SKILL]), "facts kept": mean(run, ["facts"])}


REPLICATION = Replication(
    name="corda",
    title="Low-rank tuning in directions that known facts do not use keeps them",
    papers=["2406.05223"],
    rows=[54],
    says="Decomposed by the inputs of facts, LoRA keeps the facts and learns as much as plain LoRA.",
    stages=stages,
    variants=[
        Variant("lora", {"tune": {"lora": {"rank": RANK, "alpha": RANK}}}, "low rank, random start", rates=FASTER),
        Variant("corda", preserving, "the directions that facts use least", rates=FASTER),
        Variant("full", {"tune": {"full": {}}}, "every matrix trains"),
    ],
    main=Expectation("facts kept", "corda", "lora", "more", 0.02, "it keeps more facts than LoRA"),
    also=[
        Expectation("facts kept", "corda", "full", "more", 0.02, "and more than full fine-tuning"),
        Expectation("learnt", "corda", "lora", "not_less", 0.05, "it learns as much as LoRA"),
    ],
    question="Is it enough to train some of the numbers?",
    measure=measure,
    choose=validation(SKILL),
    floor={"learnt": 0.3},
    minutes=14,
    notes="The paper tunes Llama 2 on arithmetic with rank 128 and keeps TriviaQA.",
)
