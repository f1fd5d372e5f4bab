"""S2FT (arXiv:2412.06289): whole channels and heads instead of a low rank."""

from __future__ import annotations

from luthier.lab.costs import backward_share, seconds
from luthier.lab.replication import Expectation, Finished, Replication, Variant
from luthier.lab.tasks import FASTER, learnt_and_kept, new_language, validation_gain

CHANNELS = {"s2ft": {"output": 0.1, "down": 0.1}}


def measure(finished: Finished) -> dict[str, float]:
    """What is learned and kept, and what a step costs."""
    return {
        **learnt_and_kept(finished),
        "seconds per 1000 tokens": seconds(finished.runs),
        "backward per forward": backward_share(finished),
    }


REPLICATION = Replication(
    name="s2ft",
    title="A few channels and heads learn more than a low rank, keep more, and cost less",
    papers=["2412.06289"],
    rows=[62],
    says="At as many trained numbers S2FT beats LoRA in and out of domain, and it needs less time and memory than full fine-tuning.",
    stages=new_language,
    variants=[
        Variant("full", {"tune": {"full": {"target_modules": ["linear"]}}}, "every matrix of the blocks trains"),
        Variant(
            "lora", {"tune": {"lora": {"rank": 2}}}, "low rank beside each matrix, about as many numbers as s2ft", rates=FASTER
        ),
        Variant("s2ft", {"tune": CHANNELS}, "a tenth of heads and channels, drawn at random", rates=FASTER),
    ],
    main=Expectation("gained", "s2ft", "lora", "more", 0.0, "s2ft learns more than LoRA"),
    also=[
        Expectation("kept", "s2ft", "lora", "more", 0.0, "s2ft keeps more than LoRA"),
        Expectation("kept", "s2ft", "full", "more", 0.02, "s2ft keeps more than full fine-tuning"),
        Expectation("backward per forward", "s2ft", "full", "less", 0.5, "its backward pass is cheaper"),
        Expectation("seconds per 1000 tokens", "s2ft", "full", "less", 0.0, "its steps are quicker"),
    ],
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=measure,
    choose=validation_gain,
    floor={"gained": 1.0},
    minutes=10,
    notes="The paper tunes Llama models on arithmetic and common sense; out of domain there, old skills here. Rates and learning "
    "are judged by likelihood: a first run judged by right answers, of which few numbers give hardly any.",
)
