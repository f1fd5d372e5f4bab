"""Anchored SFT (arXiv:2509.23753) on a real model: equations of word problems, and facts that contradict what is known."""

from __future__ import annotations

from statistics import fmean

from luthier.lab.real import MODEL, changed_facts, equations, other_facts, rephrased, stage
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.replications.asft import ANCHOR
from luthier.lab.replications.dft import DFT, SFT
from luthier.lab.targets import drift, targets_of

FACTS = 24


def stages(setting: Setting) -> list[Recipe]:
    """Each by itself."""
    return [
        stage(equations("train", 50, setting.seed), batch_tokens=256),
        stage(changed_facts(FACTS, setting.seed), epochs=4, batch_tokens=256),
    ]


def measure(finished: Finished) -> dict[str, float]:
    """Other problems, the same facts in other words, and facts that should stay: how likely they are, and how far the model went."""
    reasoning, knowledge = finished.runs
    facts, other = rephrased(changed_facts(FACTS, finished.setting.seed)), other_facts(40)
    found = targets_of(reasoning, equations("test", 300, 0), ["right", "nll"])
    return {
        "reasoning": float(found.least("right").mean()),
        "reasoning, nats": found.mean("nll"),
        "new facts, nats": targets_of(knowledge, facts, ["nll"]).mean("nll"),
        "drift": fmean(drift(run, other) for run in finished.runs),
        "other facts, nats": fmean(targets_of(run, other, ["nll"]).mean("nll") for run in finished.runs),
    }


def choose(finished: Finished) -> float:
    """Judges a learning rate by other problems and by the facts in other words; both are others than those measured."""
    reasoning, knowledge = finished.runs
    facts = rephrased(changed_facts(FACTS, finished.setting.seed))
    pairs = ((reasoning, equations("validation", 40, 0)), (knowledge, facts))
    return -fmean(targets_of(run, rows, ["nll"]).mean("nll") for run, rows in pairs)


REPLICATION = Replication(
    name="asft_real",
    title="DFT with an anchor, on a real model",
    papers=["2509.23753"],
    rows=[99],
    says="DFT learns no facts and drifts from the base; with a KL anchor it learns better than DFT and cross-entropy and stays near.",
    stages=stages,
    variants=[
        SFT,
        DFT,
        Variant("sft, anchored", {"objective": ["cross_entropy", ANCHOR]}, "control: the anchor without DFT", like="sft"),
        Variant("asft", {"objective": "asft"}, "DFT and KL to the base, 0.05"),
    ],
    main=Expectation("reasoning", "asft", "sft", "more", 0.03, "it solves more problems than cross-entropy"),
    also=[
        Expectation("reasoning", "asft", "dft", "not_less", 0.03, "and as many as dft"),
        Expectation("new facts, nats", "dft", "sft", "more", 0.2, "dft does not learn facts"),
        Expectation("new facts, nats", "asft", "dft", "less", 0.1, "the anchor helps it to"),
        Expectation("drift", "asft", "dft", "less", 0.0, "it stays nearer to the base than dft"),
        Expectation("other facts, nats", "asft", "sft", "less", 0.0, "it keeps more of what was known"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=measure,
    choose=choose,
    choose_stages=2,
    apart=True,
    rates=(5e-5, 2e-4),
    seeds=5,
    model=MODEL,
    data=("mawps/train", "mawps/validation", "mawps/test", "counterfact/edit", "counterfact/train"),
    floor={"reasoning": 0.05},
    minutes=23,
    notes="The paper fine-tunes 7B models on 10,000 to 100,000 rows of mathematics and medicine; here 50 problems of MAWPS and 24 facts of "
    "CounterFact. Facts are asked for in other words, which the model may not take for the same.",
)
