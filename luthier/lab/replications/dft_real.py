"""Dynamic Fine-Tuning (arXiv:2508.05629) and One-Token Rollout (arXiv:2509.26313) on a real model: word problems, some answers wrong."""

from __future__ import annotations

from luthier.lab.real import MODEL, equations, other_facts, stage, wrong_answers
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.replications.dft import DFT, SFT
from luthier.lab.targets import targets_of

ROWS, WRONG = 100, 0.2


def stages(setting: Setting) -> list[Recipe]:
    """Short problems once; one in five has the equation of another."""
    rows = equations("train", ROWS, setting.seed)
    return [stage(wrong_answers(rows, WRONG, setting.seed), batch_tokens=256)]


def measure(finished: Finished) -> dict[str, float]:
    """Other problems: equations that are the likeliest token by token, and nats of a token; nats of facts that were known."""
    run = finished.runs[0]
    found = targets_of(run, equations("test", 300, 0), ["right", "nll"])
    return {
        "right": float(found.least("right").mean()),
        "nats": found.mean("nll"),
        "nats, other facts": targets_of(run, other_facts(60), ["nll"]).mean("nll"),
    }


REPLICATION = Replication(
    name="dft_real",
    title="Weighing each target by its own probability, on a real model",
    papers=["2508.05629", "2509.26313"],
    rows=[0],
    says="Cross-entropy times the target's own probability, or a policy gradient on one token, generalizes better than cross-entropy.",
    stages=stages,
    variants=[
        SFT,
        DFT,
        Variant("otr, expected", {"objective": "otr_expected"}, "one-token rollout without the noise of its draws"),
    ],
    main=Expectation("right", "dft", "sft", "more", 0.03, "dft gets more equations right"),
    also=[
        Expectation("right", "otr, expected", "sft", "more", 0.03, "so does one-token rollout"),
        Expectation("right", "otr, expected", "dft", "not_less", 0.05, "which is as good as dft"),
        Expectation("nats, other facts", "dft", "sft", "not_more", 0.1, "what was known stays as likely"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=measure,
    choose=lambda finished: float(targets_of(finished.runs[0], equations("validation", 60, 0), ["right"]).least("right").mean()),
    rates=(5e-5, 2e-4),
    seeds=5,
    model=MODEL,
    data=("mawps/train", "mawps/validation", "mawps/test", "counterfact/train"),
    floor={"right": 0.1},
    minutes=20,
    notes="The papers fine-tune models of 1.5B to 8B parameters on solutions of mathematical problems; here 100 problems of MAWPS, and "
    "the equation alone is learnt. What is right is told with the right tokens before it, which is what greedy decoding would write.",
)
