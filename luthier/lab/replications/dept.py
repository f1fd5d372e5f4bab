"""DePT (arXiv:2309.05173): a shorter prompt and a low-rank table for the price of a long prompt."""

from __future__ import annotations

from luthier.lab.costs import seconds
from luthier.lab.replication import Expectation, Finished, Replication, Variant
from luthier.lab.tasks import learnt_and_kept, new_language, validation_gain

PROMPTS = (1e-2, 3e-2, 1e-1)


def measure(finished: Finished) -> dict[str, float]:
    """What is learned and kept, and what a step costs."""
    return {
        **learnt_and_kept(finished),
        "seconds per 1000 tokens": seconds(finished.runs),
    }


REPLICATION = Replication(
    name="dept",
    title="A short prompt and a low-rank table beat a long prompt, and are quicker",
    papers=["2309.05173"],
    rows=[40],
    says="At as many trained numbers DePT matches or beats prompt tuning and saves 20 % of time and memory.",
    stages=new_language,
    variants=[
        Variant("prompt tuning", {"tune": {"prompt_tuning": {"length": 40}}}, "40 virtual tokens", rates=PROMPTS),
        Variant(
            "dept",
            {"tune": {"dept": {"length": 16, "rank": 20, "positions": 38}}},
            "16 virtual tokens and a table of rank 20, as many numbers",
            rates=PROMPTS,
        ),
        Variant("short prompt", {"tune": {"prompt_tuning": {"length": 16}}}, "control: 16 virtual tokens alone", rates=PROMPTS),
    ],
    main=Expectation("gained", "dept", "prompt tuning", "not_less", 0.1, "it learns as much"),
    also=[
        Expectation("gained", "dept", "short prompt", "more", 0.0, "the table is what helps"),
        Expectation("seconds per 1000 tokens", "dept", "prompt tuning", "less", 0.0, "its steps are quicker"),
    ],
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=measure,
    choose=validation_gain,
    rates=PROMPTS,
    floor={"gained": 1.0},
    minutes=10,
    notes="The paper's prompts have 100 tokens and rows up to 256; rows here have about 15, so the prompt is most of what is computed.",
)
