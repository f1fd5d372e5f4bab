"""What a recipe asks to measure, read and checked before anything trains."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from luthier.errors import LuthierError, nearest
from luthier.evaluate.choose import Chosen, metric_of
from luthier.evaluate.harness import Benchmark, benchmarks
from luthier.evaluate.scoring import Scoring
from luthier.evaluate.sets import EvalSet
from luthier.kinds import Head
from luthier.recipe import VALIDATION, EvaluationSet, TrainRecipe, by_task
from luthier.rows.columns import Columns
from luthier.rows.groups import PAIR
from luthier.rows.read import read_as
from luthier.training.readout import combination

BY_HEAD = {
    "classes": ("text+label", "accuracy"),
    "labels": ("text+label", "macro_f1"),
    "tags": ("text+tags", "tag_accuracy"),
    "entities": ("text+tags", "entity_f1"),
    "value": ("text+label", "mean_absolute_error"),
    "score": (PAIR, "reward_accuracy"),
    "vector": ("members", "mean_reciprocal_rank"),
}
"""By what a head's numbers mean: the rows that it is measured on unless a recipe says otherwise, and the metric."""


def evaluation_sets(
    sets: Mapping[str, EvaluationSet],
    train: TrainRecipe,
    head: Head | None = None,
    columns: Columns | None = None,
    *,
    validated: bool = False,
) -> list[EvalSet]:
    """The evaluation sets of a recipe, read.

    Args:
        sets: as in the recipe.
        train: what it says about training.
        head: the run's, where it has one.
        columns: those of the training rows, for sets that have all of them and say nothing else.
        validated: whether rows that are held out of them are measured, too.

    Raises:
        LuthierError: rows cannot be read or do not fit their metric, tasks or their data are not there, or `best`, `patience` and
            `evaluate_every` do not go together.
    """
    sets = by_task(sets)
    of_tasks = benchmarks({name: one for name, one in sets.items() if one.tasks})
    check_evaluations([*(name for name, one in sets.items() if not one.tasks), *of_tasks], train, validated=validated)
    found = []
    for name, one in sets.items():
        if one.tasks:
            found += [
                EvalSet(each, task.rows, of_task(task), one.role, limit=None)
                for each, task in of_tasks.items()
                if each == name or each.startswith(f"{name}/")
            ]
            continue
        rows = list(read_as(one.rows, one.columns, columns, purpose="evaluate"))
        metric = one.metric
        shape, by_head = BY_HEAD.get(head.means, ("", "")) if head is not None else ("", "")
        if metric is None and rows and rows[0].shape == shape:
            metric = by_head
        asked = one.combine is not None or one.deviations is not None
        how = combination(one.combine, one.deviations, f"evaluate.{name}") if asked else None
        found.append(EvalSet(name, rows, metric, one.role, one.max_new_tokens, one.limit, how))
    return found


def of_task(one: Benchmark) -> Chosen:
    """A task's metric, which asks and scores by itself."""
    metric = metric_of(one.main.key, higher_is_better=one.main.higher_is_better)
    return Chosen(one.main.key, metric, Scoring(), code=hashlib.sha256(one.identity.encode()).hexdigest(), task=one)


def check_evaluations(sets: Collection[str], train: TrainRecipe, *, validated: bool = False) -> None:
    """Refuse keys about evaluations during training that would do nothing.

    Args:
        sets: the names of the recipe's.
        train: what it says about training.
        validated: whether held-out rows are one more set, which is measured during training whatever `evaluate_every` says.

    Raises:
        LuthierError: a key misses the one it depends on.
    """
    names = [*sets, *([VALIDATION] if validated else [])]
    if train.evaluate_every is not None and not names:
        raise LuthierError(
            "there is no evaluation set to measure during training",
            where="train.evaluate_every",
            fix="add `evaluate: {name: {rows: FILE}}`, or leave the key out",
        )
    if train.best is not None and train.best not in names:
        raise LuthierError(
            f"`best` names `{train.best}`, which is no evaluation set",
            where="train.best",
            fix=nearest(train.best, names) or "add the set under `evaluate`, or hold rows out: rows.validate: 0.1",
        )
    if train.patience is not None and train.best is None:
        raise LuthierError(
            "`patience` waits for a better result, and `best` does not say of which evaluation set",
            where="train.patience",
            fix=f"add `best: {next(iter(names), 'NAME')}`, or leave the key out",
        )
    if train.best is not None and train.evaluate_every is None and not (validated and train.best == VALIDATION):
        raise LuthierError(
            f"`best` keeps the weights at which `{train.best}` was best, and nothing is measured during training",
            where="train.best",
            fix="add `evaluate_every: STEPS`, or leave the key out",
        )
