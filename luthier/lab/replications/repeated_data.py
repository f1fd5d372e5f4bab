"""Repeated data (arXiv:2205.10487, 2305.13230, 1906.06669): as many steps on fewer rows."""

from __future__ import annotations

from luthier.lab import benchmark
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.tasks import TAUGHT, mean, stage, validation

SKILL, ROWS = "sort", 6144


def stages(setting: Setting) -> list[Recipe]:
    """Every row once."""
    return [stage(benchmark.rows(SKILL, "train", ROWS, seed=setting.seed), epochs=1)]


def repeated(times: int) -> Variant:
    """The first rows of the same draw, so often that there are as many steps."""

    def change(recipe: Recipe, number: int, setting: Setting) -> Recipe:
        rows = recipe["rows"]["train"][: ROWS // times]
        return {**recipe, "rows": {"train": rows}, "train": {**recipe["train"], "epochs": times}}

    return Variant(f"{times} times", change, f"{ROWS // times} rows, {times} epochs")


def measure(finished: Finished) -> dict[str, float]:
    """The new skill on held-out items, and the old ones."""
    run = finished.runs[0]
    return {"learnt": mean(run, [SKILL]), "kept": mean(run, TAUGHT)}


REPLICATION = Replication(
    name="repeated_data",
    title="Many epochs on few rows against one epoch on many",
    papers=["2205.10487", "2305.13230", "1906.06669"],
    rows=[162, 187, 196],
    says="A few epochs are nearly as good as fresh rows; many epochs on few rows overfit.",
    stages=stages,
    variants=[Variant("once", {}, f"{ROWS} rows, 1 epoch"), repeated(4), repeated(16), repeated(96)],
    main=Expectation("learnt", "4 times", "once", "not_less", 0.05, "four epochs are as good as fresh rows"),
    also=[
        Expectation("learnt", "16 times", "once", "less", 0.05, "sixteen are worse"),
        Expectation("learnt", "96 times", "once", "less", 0.1, "ninety-six much worse"),
    ],
    question="What do long, repeated and noisy training do?",
    measure=measure,
    choose=validation(SKILL),
    rates=(5e-4, 1e-3, 2e-3),
    floor={"learnt": 0.4},
    minutes=9,
    notes="The papers pretrain; here a skill is fine-tuned, at equal steps and tokens. Dropout, the one remedy of the second paper, is "
    "not tried: the model has none.",
)
