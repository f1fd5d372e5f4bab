"""AdaLoRA (arXiv:2303.10512): the budget goes where it is needed."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Replication, Variant
from luthier.lab.tasks import FASTER, learnt_and_kept, new_language, validation_gain

REPLICATION = Replication(
    name="adalora",
    title="Ranks spread by importance learn more than equal ones",
    papers=["2303.10512"],
    rows=[218],
    says="At the same final budget AdaLoRA beats LoRA, most where the budget is small.",
    stages=new_language,
    variants=[
        Variant("lora", {"tune": {"lora": {"rank": 2}}}, "rank 2 everywhere", rates=FASTER),
        Variant(
            "adalora",
            {"tune": {"adalora": {"initial_rank": 3, "target_rank": 2}}},
            "from rank 3 to 2 on average",
            rates=FASTER,
        ),
    ],
    main=Expectation("gained", "adalora", "lora", "more", 0.0, "at rank 2 it learns more"),
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=learnt_and_kept,
    choose=validation_gain,
    rates=FASTER,
    floor={"gained": 1.0},
    minutes=12,
    notes="The paper compares on GLUE with DeBERTa; there and here training begins with half as many ranks again.",
)
