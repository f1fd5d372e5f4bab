"""What a recipe asks to measure, read and checked before anything trains."""

from __future__ import annotations

from collections.abc import Mapping

from luthier.errors import LuthierError, nearest
from luthier.evaluate.sets import EvalSet
from luthier.recipe import EvaluationSet, TrainRecipe
from luthier.rows.read import read


def evaluation_sets(sets: Mapping[str, EvaluationSet], train: TrainRecipe) -> list[EvalSet]:
    """The evaluation sets of a recipe, read.

    Raises:
        LuthierError: rows cannot be read or do not fit their metric, or `best`, `patience` and `evaluate_every` do not go together.
    """
    check_evaluations(sets, train)
    return [
        EvalSet(name, list(read(one.rows, purpose="evaluate")), one.metric, one.side, one.max_new_tokens, one.limit)
        for name, one in sets.items()
    ]


def check_evaluations(sets: Mapping[str, EvaluationSet], train: TrainRecipe) -> None:
    """Refuse keys about evaluations during training that would do nothing.

    Raises:
        LuthierError: a key misses the one it depends on.
    """
    if train.evaluate_every is not None and not sets:
        raise LuthierError(
            "there is no evaluation set to measure during training",
            where="train.evaluate_every",
            mend="add `evaluate: {name: {rows: FILE}}`, or leave the key out",
        )
    if train.best is not None and train.best not in sets:
        raise LuthierError(
            f"`best` names `{train.best}`, which is no evaluation set",
            where="train.best",
            mend=nearest(train.best, sets) or "add the set under `evaluate`",
        )
    if train.patience is not None and train.best is None:
        raise LuthierError(
            "`patience` waits for a better result, and `best` does not say of which evaluation set",
            where="train.patience",
            mend=f"add `best: {next(iter(sets), 'NAME')}`, or leave the key out",
        )
    if train.best is not None and train.evaluate_every is None:
        raise LuthierError(
            f"`best` keeps the weights at which `{train.best}` was best, and nothing is measured during training",
            where="train.best",
            mend="add `evaluate_every: STEPS`, or leave the key out",
        )
