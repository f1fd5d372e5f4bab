"""One-Token Rollout (arXiv:2509.26313) on answers some of which are wrong, and the closed form of its expectation."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Replication, Variant
from luthier.lab.replications import dft
from luthier.lab.replications.dft import DFT, SFT, UNTOUCHED, on_new

OTR = Variant("otr", {"objective": "otr"}, "256 candidates at temperature 1.3, -0.1 for a miss")

REPLICATION = Replication(
    name="otr",
    title="Candidates of the model's own as a policy gradient, with wrong answers among the rows",
    papers=["2509.26313"],
    rows=[0],
    says="Rewarding sampled tokens that equal the target learns better than cross-entropy, in the task and beyond it.",
    stages=dft.stages,
    variants=[
        SFT,
        OTR,
        Variant("otr, expected", {"objective": "otr_expected"}, "the same without the noise of the draws"),
        DFT,
        Variant(
            "otr, expected, as dft",
            {"objective": {"otr_expected": {"temperature": 1.0, "beta": 0.0}}},
            "control: its gradient is that of dft",
            like="dft",
        ),
        UNTOUCHED,
        on_new(SFT),
        on_new(OTR),
    ],
    main=Expectation("right", "otr", "sft", "more", 0.03, "better at what it knew in part"),
    also=[
        Expectation("harder", "otr", "sft", "more", 0.03, "better at harder items of it"),
        Expectation("right", "otr", "untouched", "more", 0.0, "it has learnt something"),
        Expectation("right", "otr, new skill", "sft, new skill", "not_less", 0.03, "as good at what was new"),
        Expectation("kept", "otr, new skill", "sft, new skill", "more", 0.02, "it keeps more of what was known"),
        Expectation("right", "otr, expected", "otr", "not_less", 0.05, "the closed form does as well"),
        Expectation("right", "otr, expected, as dft", "dft", "not_less", 0.05, "at temperature 1 and beta 0 it is dft"),
        Expectation("right", "otr, expected, as dft", "dft", "not_more", 0.05, "neither worse nor better"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=dft.measure,
    choose=dft.choose,
    rates=(1e-4, 3e-4, 1e-3),
    floor={"right": 0.5},
    minutes=5,
    notes="The paper fine-tunes models of 3B to 8B parameters on mathematics and compares with cross-entropy alone. Here one answer in "
    "five is wrong. The closed form turns the randomness off, and once the temperature and the reward of misses as well, to tell whether "
    "anything but DFT is at work.",
)
