"""ProMoT (arXiv:2211.00635): a prompt that can be taken away learns the format first."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Finished, Replication, Variant
from luthier.lab.tasks import NEW_LANGUAGE, TAUGHT, accuracies, gained, mean, new_language, validation_gain

IN_CONTEXT = "in_context"


def measure(finished: Finished) -> dict[str, float]:
    """The new skill with the prompt; labels explained in context, and the old skills, without it."""
    run = finished.runs[0]
    others = accuracies(run, TAUGHT, weights_only=True)
    return {
        "learnt": mean(run, [NEW_LANGUAGE]),
        "gained": gained(run),
        "in context": accuracies(run, [IN_CONTEXT], weights_only=True)[IN_CONTEXT],
        "kept": sum(others.values()) / len(others),
    }


REPLICATION = Replication(
    name="promot",
    title="A prompt that is taken away afterwards keeps the format out of the weights",
    papers=["2211.00635"],
    rows=[238],
    says="Fine-tuning behind a tuned prompt learns the task as well and keeps in-context learning, which plain fine-tuning loses.",
    stages=new_language,
    variants=[
        Variant("full", {"tune": {"full": {}}}, "every number trains"),
        Variant("promot", {"tune": ["promot", "full"]}, "a prompt for half of the steps, then every number behind it"),
    ],
    main=Expectation("in context", "promot", "full", "more", 0.02, "it keeps more of learning in context"),
    also=[
        Expectation("gained", "promot", "full", "not_less", 0.1, "it learns the task as well"),
        Expectation("kept", "promot", "full", "more", 0.02, "it keeps more of the old skills"),
    ],
    question="Is it enough to train some of the numbers?",
    measure=measure,
    choose=validation_gain,
    floor={"gained": 1.0},
    minutes=8,
    notes="The paper tunes mT5-XXL and PaLM 8B. Both variants take the same number of steps, of which promot's prompt takes half. "
    "Rates and learning are judged by likelihood: a first run judged by right answers, of which few numbers give hardly "
    "any.",
)
