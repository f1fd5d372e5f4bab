"""Regularized Preference Optimization (arXiv:2405.16436): pairs that are nearly alike, and what becomes of the better answer."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Finished, Replication, Variant
from luthier.lab.tasks import TAUGHT, mean
from luthier.lab.tastes import chosen_nats, comparing, taste, two_stages


def measure(finished: Finished) -> dict[str, float]:
    """The likelihood of better answers to new questions, the taste, and the old skills."""
    return {**chosen_nats(finished), **taste(finished), "kept": mean(finished.runs[-1], TAUGHT)}


def choose(finished: Finished) -> float:
    """Judges a learning rate by the taste."""
    return taste(finished)["liked"]


REPLICATION = Replication(
    name="rpo",
    title="Holding the better answer up while pairs are compared",
    papers=["2405.16436"],
    rows=[240],
    says="A supervised part beside DPO keeps the likelihood of the chosen answers from falling.",
    stages=two_stages,
    variants=[
        Variant("dpo", comparing("dpo"), "the pairs, compared"),
        Variant(
            "rpo", comparing({"rpo": {"beta": 0.1, "eta": 0.2}}), "and the mean likelihood of the chosen answer, as released later"
        ),
        Variant(
            "rpo, cumulative",
            comparing({"rpo": {"beta": 0.1, "eta": 0.2, "form": "cumulative"}}),
            "and its sum, as in the paper's main text",
        ),
        Variant(
            "dpo + cross-entropy",
            comparing(["dpo", {"cross_entropy": {"weight": 0.2}}]),
            "control: a mean over all tokens of the step",
        ),
    ],
    main=Expectation("chosen", "rpo", "dpo", "less", 0.5, "better answers are likelier"),
    also=[
        Expectation("fell", "dpo", "rpo", "more", 0.5, "under dpo they fell"),
        Expectation("chosen", "rpo, cumulative", "dpo", "less", 0.5, "the paper's form does it, too"),
        Expectation("liked", "rpo", "dpo", "not_less", 0.05, "as much of the taste is learnt"),
        Expectation("chosen", "rpo", "dpo + cross-entropy", "not_more", 0.2, "it is what cross-entropy beside it does"),
    ],
    question="What do preferences teach?",
    measure=measure,
    choose=choose,
    choose_stages=2,
    unit="nats",
    rates=(1e-5, 1e-4, 1e-3),
    minutes=12,
    notes="The paper trains models of 2B and 7B parameters on preferences of users. Here the two answers of a pair differ in one word of "
    "twelve, where the fall of both is known to be worst; beta is 0.1 in all variants.",
)
