"""What a recipe asks to measure, read and checked before anything trains."""

from __future__ import annotations

from collections.abc import Mapping

from luthier.errors import LuthierError, nearest
from luthier.evaluate.sets import EvalSet
from luthier.kinds import Head
from luthier.recipe import VALIDATION, EvaluationSet, TrainRecipe
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
        LuthierError: rows cannot be read or do not fit their metric, or `best`, `patience` and `evaluate_every` do not go together.
    """
    check_evaluations(sets, train, validated=validated)
    found = []
    for name, one in sets.items():
        rows = list(read_as(one.rows, one.columns, columns, purpose="evaluate"))
        metric = one.metric
        shape, by_head = BY_HEAD.get(head.means, ("", "")) if head is not None else ("", "")
        if metric is None and rows and rows[0].shape == shape:
            metric = by_head
        asked = one.combine is not None or one.deviations is not None
        how = combination(one.combine, one.deviations, f"evaluate.{name}") if asked else None
        found.append(EvalSet(name, rows, metric, one.role, one.max_new_tokens, one.limit, how))
    return found


def check_evaluations(sets: Mapping[str, EvaluationSet], train: TrainRecipe, *, validated: bool = False) -> None:
    """Refuse keys about evaluations during training that would do nothing.

    Args:
        sets: as in the recipe.
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
