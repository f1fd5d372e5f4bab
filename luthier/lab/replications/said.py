"""Intrinsic dimension (arXiv:2012.13255): a few hundred numbers suffice."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Replication, Variant
from luthier.lab.tasks import learnt_and_kept, new_language, validation_gain

DIMENSIONS = (64, 512, 4096)
PROJECTED = (3e-3, 1e-2, 3e-2)

REPLICATION = Replication(
    name="said",
    title="A random subspace of a few hundred dimensions holds the task",
    papers=["2012.13255"],
    rows=[82],
    says="Numbers of a few hundred, projected at random onto all weights, reach 90 % of what full fine-tuning reaches.",
    stages=new_language,
    variants=[
        Variant("full", {"tune": {"full": {"target_modules": ["linear"]}}}, "every matrix of the blocks trains"),
        *(
            Variant(f"said, {dimension}", {"tune": {"said": {"dimension": dimension}}}, f"{dimension} numbers", rates=PROJECTED)
            for dimension in DIMENSIONS
        ),
    ],
    main=Expectation("gained", "said, 512", "full", "not_less", 0.1, "so do 512"),
    also=[
        Expectation("gained", "said, 4096", "full", "not_less", 0.1, "4,096 numbers reach full fine-tuning, up to a tenth"),
        Expectation("gained", "said, 512", "said, 64", "more", 0.05, "more dimensions learn more"),
    ],
    question="Is it enough to train some of the numbers?",
    unit="nats",
    measure=learnt_and_kept,
    choose=validation_gain,
    floor={"gained": 1.0},
    minutes=16,
    notes="The paper finds 90 % of accuracy on MRPC with 200 numbers of RoBERTa-large. Larger models need fewer; this one has 0.6 "
    "million. Rates and learning are judged by likelihood: a first run judged by right answers, of which few numbers give "
    "hardly any.",
)
