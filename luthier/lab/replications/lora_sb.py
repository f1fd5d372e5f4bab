"""LoRA-SB (arXiv:2411.19557): a start from the first full step, and a core of a few numbers."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Replication, Variant
from luthier.lab.tasks import FASTER, learnt_and_kept, new_language, validation_gain

REPLICATION = Replication(
    name="lora_sb",
    title="A core between two fixed bases, started from the first full step, matches LoRA with far fewer numbers",
    papers=["2411.19557"],
    rows=[66],
    says="LoRA-SB beats LoRA-XS clearly, and LoRA with 27 to 90 times fewer trained numbers.",
    stages=new_language,
    variants=[
        Variant("lora", {"tune": {"lora": {"rank": 16}}}, "low rank beside each matrix", rates=FASTER),
        Variant("lora_sb", {"tune": {"lora_sb": {"rank": 16}}}, "16 x 16 numbers a matrix, bases from the gradient", rates=FASTER),
        Variant("lora_xs", {"tune": {"lora_xs": {"rank": 16}}}, "16 x 16 numbers a matrix, bases from the weight", rates=FASTER),
    ],
    main=Expectation("gained", "lora_sb", "lora_xs", "more", 0.05, "and more than the same core between bases of the weight"),
    also=[
        Expectation("gained", "lora_sb", "lora", "not_less", 0.1, "it learns as much as LoRA"),
        Expectation("trained numbers", "lora_sb", "lora", "less", 0.0, "with fewer numbers"),
    ],
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=learnt_and_kept,
    choose=validation_gain,
    rates=FASTER,
    floor={"gained": 1.0},
    minutes=9,
    notes="Matrices are small here, so LoRA has 12 to 22 times the numbers. The paper tunes Mistral 7B and Gemma 2 9B on "
    "arithmetic. Rates and learning are judged by likelihood: a first run judged by right answers, of which few numbers "
    "give hardly any.",
)
