"""Direct Coverage Optimization (arXiv:2502.07154) on a real model: what bank customers want, trained briefly and for long."""

from __future__ import annotations

from statistics import fmean

from luthier.lab.real import MODEL, intents, stage
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.targets import TOP, targets_of

ROWS, SHORT, LONG = 60, 1, 4
SAMPLES = (1, 16, 256)


def stages(setting: Setting) -> list[Recipe]:
    """Few questions, several times."""
    return [stage(intents("train", ROWS, setting.seed), epochs=LONG, batch_tokens=256)]


def measure(finished: Finished) -> dict[str, float]:
    """The chance that one of N samples is the intent, exact since it has one name; how sure the model is."""
    found = targets_of(finished.runs[0], intents("test", 120, 0), ["nll", TOP])
    return {**{f"pass@{samples}": found.coverage(samples) for samples in SAMPLES}, "top probability": found.mean("top")}


def choose(finished: Finished) -> float:
    """Judges a learning rate by the mean over all N, on questions that no run is trained on or measured by."""
    found = targets_of(finished.runs[0], intents("test", 240, 0)[120:], ["nll"])
    return fmean(found.coverage(samples) for samples in SAMPLES)


REPLICATION = Replication(
    name="dco_real",
    title="Limiting confidence for the sake of many samples, on a real model",
    papers=["2502.07154"],
    rows=[193],
    says="Long training with cross-entropy lowers the chance that one of many samples is right; training for that chance raises it.",
    stages=stages,
    variants=[
        Variant("ce", {"objective": "cross_entropy"}, f"cross-entropy, {LONG} times over the rows"),
        Variant("ce, short", {"objective": "cross_entropy", "train": {"epochs": SHORT}}, "once", like="ce"),
        Variant("dco, 256", {"objective": {"dco": {"samples": 256}}}, "for one of 256 samples to be right"),
    ],
    main=Expectation("pass@256", "dco, 256", "ce", "more", 0.0, "trained for 256 samples, they hold the answer more often"),
    also=[
        Expectation("pass@1", "ce", "ce, short", "more", 0.02, "longer training makes one answer better"),
        Expectation("pass@256", "ce", "ce, short", "less", 0.0, "and costs coverage"),
        Expectation("pass@1", "ce", "dco, 256", "more", 0.02, "for one sample cross-entropy is better"),
        Expectation("top probability", "dco, 256", "ce", "less", 0.05, "the model is less sure"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=measure,
    choose=choose,
    rates=(5e-5, 2e-4),
    seeds=5,
    model=MODEL,
    data=("banking77/train", "banking77/test"),
    floor={"pass@1": 0.2},
    minutes=20,
    notes="The paper fine-tunes Llama 3 8B on competition mathematics and proves theorems; here 60 questions of BANKING77 about 12 "
    "intents, so that pass@N follows from the probability of the one right answer.",
)
