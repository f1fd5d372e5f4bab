"""GreenTrainer (arXiv:2309.13192): which tensors are worth their backward pass."""

from __future__ import annotations

from luthier.lab.costs import backward_share
from luthier.lab.replication import Expectation, Finished, Replication, Variant
from luthier.lab.tasks import learnt_and_kept, new_language, validation_gain


def measure(finished: Finished) -> dict[str, float]:
    """What is learned and kept, and operations of a step for each of the forward pass."""
    return {**learnt_and_kept(finished), "operations per forward": 1 + backward_share(finished)}


REPLICATION = Replication(
    name="greentrainer",
    title="Half of the operations learn as much",
    papers=["2309.13192"],
    rows=[15],
    says="Choosing tensors by importance and cost saves up to 64 % of the operations of fine-tuning without notable loss.",
    stages=new_language,
    variants=[
        Variant("full", {"tune": {"full": {"target_modules": ["linear"]}}}, "every matrix of the blocks trains"),
        Variant(
            "greentrainer", {"tune": {"greentrainer": {"target": 0.5, "target_modules": ["linear"]}}}, "half of the operations"
        ),
        Variant("top blocks", {"tune": {"full": {"target_modules": ["linear"], "blocks": [3]}}}, "control: the last block of four"),
    ],
    main=Expectation("gained", "greentrainer", "full", "not_less", 0.1, "half of the operations learn as much"),
    also=[
        Expectation("operations per forward", "greentrainer", "full", "less", 1.0, "they are saved indeed"),
        Expectation("gained", "greentrainer", "top blocks", "more", 0.0, "choosing beats the last block"),
    ],
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=measure,
    choose=validation_gain,
    floor={"gained": 1.0},
    minutes=14,
    notes="Operations are counted on the first selection. The paper summarizes and writes abstracts with OPT and BLOOMZ. Rates "
    "and learning are judged by likelihood: a first run judged by right answers, of which few numbers give hardly any.",
)
