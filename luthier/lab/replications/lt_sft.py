"""LT-SFT (arXiv:2110.07560): sparse changes that can be added up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luthier.delta import Delta
from luthier.evaluate.sets import EvalSet
from luthier.evaluate.sets import measure as measure_sets
from luthier.lab import benchmark
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.skill import Split
from luthier.lab.tasks import ITEMS, NEW_LANGUAGE, stage, teach
from luthier.results.opened import open_base, open_run
from luthier.rows.read import read

SHARE = 0.08


def as_task(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The task: answer in a sentence."""
    key = "completion" if "completion" in rows[0] else "answer"
    return [{**row, key: f"well, it is {row[key]}"} for row in rows]


def stages(setting: Setting) -> list[Recipe]:
    """The language and the task, each from the base: facts asked in a new language; facts answered in sentences."""
    task = as_task(benchmark.rows("facts", "train", 600, seed=setting.seed))
    return [teach(NEW_LANGUAGE, setting, count=600, epochs=10), stage(task, epochs=4)]


def items(skill: str, split: Split) -> EvalSet:
    """Held-back items, answered as the task asks."""
    rows = as_task(list(benchmark.sets([skill], split=split, count=ITEMS)[skill]["rows"]))
    return EvalSet(skill, list(read(rows, name=skill)), "equal", "target", 24)


def transferred(finished: Finished, split: Split) -> tuple[float, float]:
    """Questions in the new language, answered as the task asks, by the base with both changes added: right answers, and the loss."""
    tune, tokenizer = open_base(finished.runs[0])
    language, task = (Delta.load(run.folder / "delta.safetensors") for run in finished.runs)
    (language + task).apply(tune.model)
    asked = items(NEW_LANGUAGE, split)
    right, loss = (measure_sets(tune, tokenizer, [one])[NEW_LANGUAGE].value for one in (asked, replace(asked, metric="loss")))
    return right, loss


def measure(finished: Finished) -> dict[str, float]:
    """Each change alone, and both together where neither was trained: the task in the other language."""
    tune, tokenizer = open_run(finished.runs[1])
    found = measure_sets(tune, tokenizer, [items("facts", "held_out"), items(NEW_LANGUAGE, "held_out")])
    right, loss = transferred(finished, "held_out")
    return {
        "task": found["facts"].value,
        "task in the new language, without it": found[NEW_LANGUAGE].value,
        "task in the new language": right,
        "its loss": loss,
    }


REPLICATION = Replication(
    name="lt_sft",
    title="Sparse changes for a language and for a task add up",
    papers=["2110.07560"],
    rows=[13],
    says="Sparse changes for a task and a language, trained apart and added, transfer the task better than dense ones.",
    stages=stages,
    variants=[
        Variant("full", {"tune": {"full": {}}}, "dense changes"),
        Variant("lt_sft", {"tune": {"lt_sft": {"share": SHARE}}}, "the 8 % that moved most, trained again from the base"),
    ],
    main=Expectation("its loss", "lt_sft", "full", "less", 0.05, "answers are likelier with sparse changes than with dense ones"),
    also=[
        Expectation("task in the new language", "lt_sft", "full", "more", 0.02, "and more of them are right"),
        Expectation("task", "lt_sft", "full", "not_less", 0.05, "and learn the task as well"),
    ],
    question="Is it enough to train some of the numbers?",
    measure=measure,
    choose=lambda finished: -transferred(finished, "validation")[1],
    choose_stages=2,
    unit="nats",
    apart=True,
    floor={"task": 0.2},
    minutes=16,
    notes="The paper adapts multilingual models to languages by masked-language modeling; here a language is learnt from questions.",
)
