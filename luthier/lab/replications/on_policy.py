"""On-policy data and negative gradients (arXiv:2404.14367): whose answers a policy learns from, and whether some are pushed down."""

from __future__ import annotations

from functools import cache

from luthier.lab.bandit import (
    DRAWN,
    FAR,
    NEAR,
    STATES,
    STEPS,
    Way,
    best_of_n,
    drift,
    expected_reward,
    learn,
    over_pairs,
    reinforce,
    reinforce_upwards,
)
from luthier.lab.replication import CHOOSING_SEED, Expectation, Finished, Recipe, Replication, Setting, Variant

RATES = (0.01, 0.03, 0.1)
WAYS = {
    "best of n": Way(best_of_n, fresh=False),
    "dpo": Way(over_pairs("dpo", beta=0.05), fresh=False),
    "ipo": Way(over_pairs("ipo", beta=0.05), fresh=False),
    "best of n, fresh": Way(best_of_n, fresh=True),
    "dpo, fresh": Way(over_pairs("dpo", beta=0.05), fresh=True),
    "ipo, fresh": Way(over_pairs("ipo", beta=0.05), fresh=True),
    "policy gradient": Way(reinforce, fresh=True),
    "policy gradient, upwards": Way(reinforce_upwards, fresh=True),
}
MEANINGS = {
    "best of n": "cross-entropy on the best of the reference's answers",
    "dpo": "pairs of the reference's answers",
    "ipo": "the same, up to a margin",
    "best of n, fresh": "the three, with answers drawn again from the policy",
    "policy gradient": "fresh answers, up where better than the mean and down where worse",
    "policy gradient, upwards": "fresh answers, up alone",
}


def stages(setting: Setting) -> list[Recipe]:
    """None: the policy is a table, which measuring trains."""
    return []


@cache
def rate_of(name: str, best: int) -> float:
    """The learning rate of a variant and task, from a grid of one size, with draws that nothing is measured on; of equals the smallest."""
    return max(RATES, key=lambda rate: (expected_reward(learn(WAYS[name], best, rate, CHOOSING_SEED), best), -rate))


def measure(finished: Finished) -> dict[str, float]:
    """What the policy gets where good answers are unlikely under the reference, how far it went, and what it gets where they are likely."""
    name, seed = finished.variant.name, finished.setting.seed
    far, near = (learn(WAYS[name], best, rate_of(name, best), seed) for best in (FAR, NEAR))
    return {"far": expected_reward(far, FAR), "drift": drift(far), "near": expected_reward(near, NEAR)}


REPLICATION = Replication(
    name="on_policy",
    title="Learning from fresh answers of one's own",
    papers=["2404.14367"],
    rows=[55],
    says="Where good answers are unlikely under the reference, answers drawn from the policy itself, and pushing worse ones down, decide; "
    "where they are likely, answers of the reference do.",
    stages=stages,
    variants=[Variant(name, {}, MEANINGS.get(name, "")) for name in WAYS],
    main=Expectation("far", "ipo, fresh", "ipo", "more", 0.2, "fresh answers find what the reference hardly says"),
    also=[
        Expectation("far", "dpo, fresh", "dpo", "more", 0.1, "with dpo, too"),
        Expectation("far", "best of n, fresh", "best of n", "more", 0.2, "and without pushing anything down"),
        Expectation("near", "ipo, fresh", "ipo", "not_more", 0.15, "where answers are likely it matters less"),
        Expectation("far", "ipo", "best of n", "more", 0.05, "of the reference's answers, pairs teach more than the best alone"),
        Expectation("far", "policy gradient", "policy gradient, upwards", "more", 0.02, "pushing down helps fresh answers, too"),
    ],
    question="What do preferences teach?",
    measure=measure,
    choose=lambda finished: 0.0,
    unit="expected reward, 0 to 1",
    minutes=3,
    notes=f"The paper's bandit: 100 answers, {DRAWN} drawn at a time in each of {STATES} states, {STEPS} steps of Adam; its policies are a "
    "network that states share, these are a table each, so that nothing learnt in one state helps in another. No language model is "
    f"trained: learning rates ({', '.join(f'{rate:g}' for rate in RATES)}) are chosen while measuring, for each variant and task alike. "
    "Its experiments on lengths and on preferences of users were not repeated.",
)
