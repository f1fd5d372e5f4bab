"""Dynamic Fine-Tuning (arXiv:2508.05629) on answers some of which are wrong: a skill half known, and one that is new."""

from __future__ import annotations

from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.tasks import TAUGHT, mean, teach

KNOWN, NEW, WRONG = "pairs", "largest", 0.2
"""The built-in model tells of three in five pairs what follows, and has never met the other; `WRONG` is the share of wrong answers."""
RATES = (3e-4, 1e-3, 3e-3)
UNTOUCHED = Variant(
    "untouched", {"train": {"steps": 1, "learning_rate": 1e-12}}, "the model as it was, but for a step too small to matter"
)


def stages(setting: Setting) -> list[Recipe]:
    """What follows from what, which the model knows in part."""
    return [teach(KNOWN, setting, count=1000, epochs=2, noise=WRONG)]


def on_new(variant: Variant) -> Variant:
    """The same variant on a skill that is new to the model, which takes larger steps."""
    assert not callable(variant.change)
    keys = dict(variant.change)

    def change(recipe: Recipe, number: int, setting: Setting) -> Recipe:
        return {**recipe, **teach(NEW, setting, count=120, epochs=8, noise=WRONG), **keys}

    return variant._replace(
        name=f"{variant.name}, new skill", change=change, meaning=f"{variant.meaning}; a skill that is new", rates=RATES
    )


def skill_of(finished: Finished) -> str:
    """What a variant teaches."""
    return NEW if finished.variant.name.endswith("new skill") else KNOWN


def measure(finished: Finished) -> dict[str, float]:
    """Clean items as hard as those trained on, harder ones, and the old skills."""
    run, skill = finished.runs[0], skill_of(finished)
    return {
        "right": mean(run, [skill]),
        "harder": mean(run, [skill], difficulty=2),
        "kept": mean(run, TAUGHT),
    }


def choose(finished: Finished) -> float:
    """Judges a learning rate by clean validation items."""
    return mean(finished.runs[0], [skill_of(finished)], split="validation")


SFT = Variant("sft", {"objective": "cross_entropy"}, "cross-entropy")
DFT = Variant("dft", {"objective": "cross_entropy", "token_weight": "dft"}, "each target counts its own probability")

REPLICATION = Replication(
    name="dft",
    title="Weighing each target by its own probability, with wrong answers among the rows",
    papers=["2508.05629"],
    rows=[],
    says="Cross-entropy times the target's own probability generalizes better than cross-entropy.",
    stages=stages,
    variants=[SFT, DFT, UNTOUCHED, on_new(SFT), on_new(DFT)],
    main=Expectation("right", "dft", "sft", "more", 0.03, "better at what it knew in part"),
    also=[
        Expectation("harder", "dft", "sft", "more", 0.03, "better at harder items of it"),
        Expectation("right", "dft", "untouched", "more", 0.0, "it has learnt something"),
        Expectation("right", "dft, new skill", "sft, new skill", "not_less", 0.03, "as good at what was new"),
        Expectation("harder", "dft, new skill", "sft, new skill", "not_less", 0.03, "and at harder items of it"),
        Expectation("kept", "dft, new skill", "sft, new skill", "more", 0.02, "it keeps more of what was known"),
    ],
    question="Is there a better loss than cross-entropy?",
    measure=measure,
    choose=choose,
    rates=(1e-4, 3e-4, 1e-3),
    floor={"right": 0.5},
    minutes=3,
    notes="The paper fine-tunes models of 1.5B to 8B parameters on clean solutions of mathematical problems. Here one answer in five "
    "is wrong, and the new skill starts from steps the model finds unlikely, as the paper's tasks seldom do.",
)
