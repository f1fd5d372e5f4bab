"""LIFT (arXiv:2506.00772): the largest entries of the low-rank part of a weight are the ones to train."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Replication, Variant
from luthier.lab.tasks import FASTER, learnt_and_kept, new_language, validation_gain

ENTRIES = {"lora_rank": 4, "every": 30}

REPLICATION = Replication(
    name="lift",
    title="Principal weights learn as much as all and keep more",
    papers=["2506.00772"],
    rows=[23],
    says="Training the largest entries after rank reduction learns as much as full tuning, and keeps up to 20 % more than it and LoRA.",
    stages=new_language,
    variants=[
        Variant("full", {"tune": {"full": {"target_modules": ["linear"]}}}, "every matrix of the blocks trains"),
        Variant("lora", {"tune": {"lora": {"rank": 4}}}, "low rank, as many numbers as lift", rates=FASTER),
        Variant("lift", {"tune": {"lift": {"rank": 8, **ENTRIES}}}, "the largest entries of the rank-8 part", rates=FASTER),
    ],
    main=Expectation("gained", "lift", "full", "not_less", 0.1, "lift learns as much as full"),
    also=[
        Expectation("gained", "lift", "lora", "not_less", 0.1, "lift learns as much as LoRA"),
        Expectation("kept", "lift", "full", "more", 0.02, "lift keeps more than full"),
        Expectation("kept", "lift", "lora", "more", 0.02, "lift keeps more than LoRA"),
    ],
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=learnt_and_kept,
    choose=validation_gain,
    floor={"gained": 1.0},
    minutes=12,
    notes="The paper trains about 5 % of Llama's weights on arithmetic; here it is about as many numbers as LoRA of rank 4 has. "
    "Rates and learning are judged by likelihood: a first run judged by right answers, of which few numbers give hardly "
    "any.",
)
