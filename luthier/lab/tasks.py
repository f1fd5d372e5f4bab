"""What replications have in common: stages that teach skills of the synthetic benchmark, and what is measured of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from luthier.evaluate.sets import EvalSet, measure
from luthier.lab import benchmark
from luthier.lab.benchmark_sets import sets_of
from luthier.lab.replication import Finished, Recipe, Setting
from luthier.lab.skill import Split
from luthier.lab.skills.facts import world as world_facts
from luthier.results.folder import Run
from luthier.results.opened import open_base, open_run
from luthier.rows.read import read

TAUGHT = ("facts", "boxes", "copy", "reverse", "case", "sentiment", "topic", "refusals", "translate")
"""What the built-in models answer rightly in four of five cases or more: what a fine-tune should leave alone."""
NEW_LANGUAGE = "second_language"
FASTER = (1e-3, 3e-3, 1e-2)
"""What trains less takes larger steps: these techniques' grid is that of full fine-tuning, moved up by one."""
BATCH_TOKENS = 512
"""Tokens of a step: the built-in models learn from many small steps."""
ITEMS, EACH = 300, 60
"""Held-back items of a skill that is asked alone, and of each where several are asked; a skill that has fewer gives all."""
FEW = 24
"""People that `few_facts` tells of: five facts of each."""


def teach(skill: str, setting: Setting, *, count: int, epochs: float, **options: Any) -> Recipe:
    """A stage that teaches one skill from rows drawn by the setting's seed.

    Args:
        skill: of the synthetic benchmark.
        setting: the repetition.
        count: rows.
        epochs: passes over them.
        options: difficulty and noise, as for `luthier.lab.benchmark.rows`.
    """
    return stage(benchmark.rows(skill, "train", count, seed=setting.seed, **options), epochs)


def new_language(setting: Setting) -> list[Recipe]:
    """The stage that most replications about tuning share: known facts, asked for in a language that is new."""
    return [teach(NEW_LANGUAGE, setting, count=600, epochs=10)]


def few_facts(split: Split, count: int = 60, seed: int = 0, noise: float = 0.0) -> list[dict[str, Any]]:
    """New facts about a few people alone, so that each is met often, as rows or items; so many of them, or all there are."""
    few = world_facts().new[:FEW]
    # Three of ten are about them; more items than these there are none.
    drawn = benchmark.rows("new_facts", split, 5 * count if split == "train" else 200, seed=seed, noise=noise)
    return [row for row in drawn if any(one in row["prompt"] for one in few)][:count]


def stage(rows: Sequence[dict[str, Any]], epochs: float) -> Recipe:
    """A stage on given rows."""
    train = {
        "epochs": epochs,
        "batch_tokens": BATCH_TOKENS,
        "micro_batch_tokens": 2 * BATCH_TOKENS,
        "precision": "fp32",
        "warmup": 0.05,
    }
    return {"rows": {"train": list(rows)}, "train": train}


def accuracies(
    run: Run,
    skills: Sequence[str],
    *,
    split: Split = "held_out",
    count: int | None = None,
    difficulty: int = 1,
    weights_only: bool = False,
) -> dict[str, float]:
    """The share of items a run's model answers rightly, by skill; for running text the loss."""
    count = count or (ITEMS if len(skills) == 1 else EACH)
    tune, tokenizer = open_run(run, weights_only=weights_only)
    found = measure(tune, tokenizer, sets_of(skills, split=split, count=count, difficulty=difficulty))
    return {name: result.value for name, result in found.items()}


def right(run: Run, items: Sequence[dict[str, Any]]) -> float:
    """The share of items that a run's model answers as they have it."""
    found = measure(*open_run(run), [EvalSet("items", list(read(list(items))), "equal", max_new_tokens=16)])
    return found["items"].value


def learnt_and_kept(finished: Finished) -> dict[str, float]:
    """The new skill, as right answers and as nats, the old ones, and how many numbers trained for it."""
    run = finished.runs[0]
    return {
        "learnt": mean(run, [NEW_LANGUAGE]),
        "gained": gained(run),
        "kept": mean(run, TAUGHT),
        "trained numbers": float(run.facts["trained_parameters"]),
    }


def gained(run: Run, split: Split = "held_out") -> float:
    """Nats by which a target token of the new language became likelier: it tells techniques apart that get few answers right."""
    (items,) = sets_of([NEW_LANGUAGE], split=split, count=ITEMS)
    likely = replace(items, metric="loss")
    before, after = (measure(*opened(run), [likely])[NEW_LANGUAGE].value for opened in (open_base, open_run))
    return before - after


def validation_gain(finished: Finished) -> float:
    """Judges a learning rate by the likelihood of the new language's validation items."""
    return gained(finished.runs[0], "validation")


def mean(run: Run, skills: Sequence[str], *, split: Split = "held_out", count: int | None = None, difficulty: int = 1) -> float:
    """The mean accuracy over skills, as `accuracies` takes them."""
    return fmean(accuracies(run, skills, split=split, count=count, difficulty=difficulty).values())


def validation(skill: str) -> Any:
    """Judges a learning rate by a skill's validation items."""

    def choose(finished: Finished) -> float:
        return mean(finished.runs[0], [skill], split="validation")

    return choose
