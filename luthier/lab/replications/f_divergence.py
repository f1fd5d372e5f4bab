"""Implicit rewards (arXiv:2507.00018): what holds fine-tuning near the base, smaller learning rates and other divergences."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Finished, Replication, Variant
from luthier.lab.targets import answered, drift, targets_of
from luthier.lab.tasks import NEW_LANGUAGE, TAUGHT, mean, new_language, validation


def measure(finished: Finished) -> dict[str, float]:
    """The new skill, as right answers and as nats; how far the model went from the base on old items; the old skills."""
    run = finished.runs[0]
    return {
        "learnt": mean(run, [NEW_LANGUAGE]),
        "nats": targets_of(run, answered([NEW_LANGUAGE], count=150), ["nll"]).mean("nll"),
        "drift": drift(run, answered(TAUGHT, count=40)),
        "kept": mean(run, TAUGHT),
    }


def slower(part: int) -> Variant:
    """Cross-entropy at a part of its rate."""
    return Variant(
        f"sft, 1/{part}", {"objective": "cross_entropy"}, f"at a rate {part} times smaller", like="sft", rate_factor=1 / part
    )


def divergence(name: str, meaning: str) -> Variant:
    """Another divergence, at the rate of cross-entropy."""
    return Variant(name, {"objective": {"f_divergence": {"divergence": name}}}, meaning, like="sft")


REPLICATION = Replication(
    name="f_divergence",
    title="What holds fine-tuning near the base",
    papers=["2507.00018"],
    rows=[101],
    says="Nothing in cross-entropy holds a model near its base; a smaller learning rate or another divergence does, at no cost.",
    stages=new_language,
    variants=[
        Variant("sft", {"objective": "cross_entropy"}, "cross-entropy at the best rate"),
        slower(2),
        slower(4),
        slower(8),
        divergence("chi2", "stops on a token that became e^2 times as likely"),
        divergence("hellinger", "slows down as a token becomes likelier"),
    ],
    main=Expectation("drift", "chi2", "sft", "less", 0.0, "chi-squared stays nearer to the base"),
    also=[
        Expectation("drift", "sft, 1/4", "sft", "less", 0.0, "a quarter of the rate stays nearer to the base"),
        Expectation("learnt", "sft, 1/4", "sft", "not_less", 0.05, "and learns as much"),
        Expectation("learnt", "chi2", "sft", "not_less", 0.05, "and learns as much"),
        Expectation("drift", "hellinger", "sft", "less", 0.0, "so does Hellinger"),
        Expectation("learnt", "hellinger", "sft", "not_less", 0.05, "and learns as much"),
        Expectation("kept", "sft, 1/4", "sft", "more", 0.02, "a quarter of the rate keeps more of what was known"),
    ],
    question="Is there a better loss than cross-entropy?",
    unit="nats",
    measure=measure,
    choose=validation(NEW_LANGUAGE),
    floor={"learnt": 0.3},
    minutes=6,
    notes="The paper judges models of 7B and 8B parameters by what a preference optimization (DPO) makes of them afterwards. That is not "
    "asked here, but what is said to be the reason: how near to the base each stays, and what it learns.",
)
