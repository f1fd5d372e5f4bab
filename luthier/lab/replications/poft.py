"""Preference-Oriented Fine-Tuning (arXiv:2412.12865): rows with wrong answers, and a model that finds those unlikely."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from luthier.evaluate.likelihood import likelihoods
from luthier.lab import benchmark
from luthier.lab.replication import Expectation, Finished, Recipe, Replication, Setting, Variant
from luthier.lab.skills.facts import PERSON
from luthier.lab.targets import answered, targets_of
from luthier.lab.tasks import NEW_LANGUAGE, TAUGHT, mean, stage, validation
from luthier.results.opened import open_model
from luthier.rows.encode import encode
from luthier.rows.read import read

ROWS, WRONG, EPOCHS = 600, 0.3, 6
SCORE = "aligned_log_likelihood"


def in_english(prompt: str) -> str:
    """The same question in the language that the aligned model was taught."""
    for relation in PERSON.values():
        before, after = relation.second_language.split("{e}")
        if prompt.startswith(before) and prompt.endswith(after):
            return relation.trained[0].format(e=prompt.removeprefix(before).removesuffix(after))
    raise AssertionError(prompt)


@cache
def scored(model: str, seed: int) -> list[dict[str, Any]]:
    """Rows, of which some are wrong, with the mean log-likelihood of each answer's tokens under the aligned model."""
    rows = benchmark.rows(NEW_LANGUAGE, "train", ROWS, seed=seed, noise=WRONG)
    threads = torch.get_num_threads()
    # Every process of the lab must find the same scores, bit for bit.
    torch.set_num_threads(1)
    try:
        tune, tokenizer = open_model(model, precision="fp32")
        asked = [{**row, "prompt": in_english(row["prompt"])} for row in rows]
        found = likelihoods(tune, [encode(row, tokenizer) for row in read(asked).rows])
    finally:
        torch.set_num_threads(threads)
    return [{**row, SCORE: round(-one.nats / one.targets, 3)} for row, one in zip(rows, found, strict=True)]


def stages(setting: Setting) -> list[Recipe]:
    """All rows, the wrong ones too."""
    return [stage(scored(setting.model, setting.seed), EPOCHS)]


def best_scored(recipe: Recipe, number: int, setting: Setting) -> Recipe:
    """The rows with the best scores alone, as many as there are right ones, in as many steps."""
    rows = sorted(recipe["rows"]["train"], key=lambda row: (-row[SCORE], row["id"]))
    kept = rows[: round(len(rows) * (1 - WRONG))]
    train = {**recipe["train"], "epochs": EPOCHS * len(rows) / len(kept)}
    return {**recipe, "rows": {"train": kept}, "train": train}


def measure(finished: Finished) -> dict[str, float]:
    """Clean items: right answers and nats of a token; the old skills."""
    run = finished.runs[0]
    return {
        "right": mean(run, [NEW_LANGUAGE]),
        "nats": targets_of(run, answered([NEW_LANGUAGE], count=150), ["nll"]).mean("nll"),
        "kept": mean(run, TAUGHT),
    }


REPLICATION = Replication(
    name="poft",
    title="Preferring the model to one that is aligned already",
    papers=["2412.12865"],
    rows=[77],
    says="A preference over an aligned model's likelihood of each row does more with noisy rows than cross-entropy.",
    stages=stages,
    variants=[
        Variant("sft", {"objective": "cross_entropy"}, "cross-entropy on all rows"),
        Variant("poft", {"objective": "poft"}, "the preference on all rows"),
        Variant(
            "sft, half the rate",
            {"objective": "cross_entropy"},
            "control: what weights of a half come to",
            like="sft",
            rate_factor=0.5,
        ),
        Variant("sft, filtered", best_scored, "control: cross-entropy on the 70 % with the best scores"),
    ],
    main=Expectation("nats", "poft", "sft", "less", 0.1, "clean answers are likelier"),
    also=[
        Expectation("right", "poft", "sft", "more", 0.03, "more clean items are right"),
        Expectation("right", "poft", "sft, half the rate", "more", 0.03, "it is not that steps are smaller"),
        Expectation("nats", "poft", "sft, filtered", "not_more", 0.1, "as good as leaving out what scores worst"),
    ],
    question="Which rows and tokens are worth learning from?",
    measure=measure,
    choose=validation(NEW_LANGUAGE),
    unit="nats",
    floor={"right": 0.25},
    minutes=3,
    notes="The paper scores with three aligned models of 6B to 8B parameters. Here the model before training scores, asked the same in "
    "English, the language in which it was taught the answers; it is right in 19 of 20 cases, so a wrong answer is told by its score.",
)
