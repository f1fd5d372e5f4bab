"""LoFiT (arXiv:2406.01563): offsets at a few chosen heads."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Replication, Variant
from luthier.lab.tasks import FASTER, learnt_and_kept, new_language, validation_gain

REPLICATION = Replication(
    name="lofit",
    title="Offsets at a few heads do what LoRA does",
    papers=["2406.01563"],
    rows=[44],
    says="Learning offsets at 3 % of the heads matches LoRA with 20 to 200 times fewer numbers; chosen heads beat random ones.",
    stages=new_language,
    variants=[
        Variant("lora", {"tune": {"lora": {"rank": 1}}}, "rank 1 beside each matrix", rates=FASTER),
        Variant("lofit", {"tune": {"lofit": {"share": 0.2}}}, "offsets at 2 of 12 heads", rates=(5e-3, 1.5e-2, 5e-2)),
        Variant("lofit, all heads", {"tune": {"lofit": {"share": 1.0}}}, "control: every head", rates=(5e-3, 1.5e-2, 5e-2)),
    ],
    main=Expectation("gained", "lofit", "lora", "not_less", 0.1, "it learns as much as LoRA"),
    also=[
        Expectation("gained", "lofit", "lofit, all heads", "not_less", 0.1, "a few heads do as well as all"),
        Expectation("kept", "lofit", "lora", "more", 0.02, "it keeps more"),
    ],
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=learnt_and_kept,
    choose=validation_gain,
    rates=FASTER,
    floor={"gained": 1.0},
    minutes=9,
    notes="The model has 12 heads, so 3 % would be none: a fifth is taken. The paper steers behavior that the model has; here facts "
    "that it knows are asked for in a new language.",
)
