"""SpIEL (arXiv:2401.16405): sparse fine-tuning that drops and regrows, at LoRA's size."""

from __future__ import annotations

from typing import Any

from luthier.lab.replication import Expectation, Replication, Variant
from luthier.lab.tasks import FASTER, learnt_and_kept, new_language, validation_gain


def sparse(**options: Any) -> dict[str, Any]:
    """About as many entries as LoRA of rank 4 has numbers."""
    return {"tune": {"spiel": {"density": 0.03, **options}}}


REPLICATION = Replication(
    name="spiel",
    title="Sparse fine-tuning that drops and regrows learns more than LoRA",
    papers=["2401.16405"],
    rows=[41],
    says="At as many trained numbers, SpIEL often beats LoRA; growing by gradients is a little better than by accumulated ones.",
    stages=new_language,
    variants=[
        Variant("lora", {"tune": {"lora": {"rank": 4}}}, "low rank", rates=FASTER),
        Variant("spiel", sparse(), "entries, regrown by gradients", rates=FASTER),
        Variant("spiel, momentum", sparse(criterion="momentum"), "entries, regrown by accumulated gradients", rates=FASTER),
        Variant(
            "fixed entries", sparse(every=100_000), "control: random entries that stay after the first selection", rates=FASTER
        ),
    ],
    main=Expectation("gained", "spiel", "lora", "more", 0.0, "spiel learns more than LoRA"),
    also=[
        Expectation("gained", "spiel", "spiel, momentum", "not_less", 0.1, "gradients grow as well as accumulated ones"),
        Expectation("gained", "spiel", "fixed entries", "more", 0.0, "dropping and growing on is what helps"),
    ],
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=learnt_and_kept,
    choose=validation_gain,
    rates=FASTER,
    floor={"gained": 1.0},
    minutes=12,
    notes="The paper tunes Llama 2 on instructions. The control keeps the one selection that follows the first gathering of gradients.",
)
