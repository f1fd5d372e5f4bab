"""Rows of several tasks: which one each row is of, and weights of labels that give every task its share of a step's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from luthier.draws import names_of, seed_of, seeds_of_numbers
from luthier.errors import LuthierError
from luthier.kinds import Batch, StepTable

Unit = Literal["tokens", "rows"]
"""Whether a task's loss is the mean over its labels, or the mean over its rows of each one's mean over its labels."""


def tasks_of(table: StepTable, column: str, technique: str) -> tuple[Tensor, Tensor]:
    """The tasks of a step, and each label's.

    Args:
        table: the step.
        column: the rows' free column that names their tasks, in texts or numbers.
        technique: who asks, for errors.

    Returns:
        The seeds of the tasks' names (`luthier.draws.seed_of`) in order, [K], and each label's place among them, [M].

    Raises:
        LuthierError: a row has no such column.
    """
    values_M = table.of_rows(column)
    if values_M is None:
        values_M = torch.full((len(table),), seed_of(""))
    if values_M.is_floating_point():
        values_M = seeds_of_numbers(values_M)
    if bool((values_M == seed_of("")).any()):
        raise _without_task("a row of this step", column, technique)
    key_K, task_M = values_M.unique(return_inverse=True)
    return key_K, task_M


def task_names(batch: Batch, column: str, technique: str) -> list[str]:
    """The names of the rows' tasks; numbers as they are written.

    Raises:
        LuthierError: a row has no such column.
    """
    names = names_of(batch.texts.get(column, ()), batch.columns.get(column))
    for row, name in zip(batch.row_ids, names or [""] * len(batch.row_ids), strict=True):
        if not name:
            raise _without_task(f"the row `{row}`", column, technique)
    return names


def check_tasks(column: str, technique: str, known: Sequence[str] | None = None) -> Callable[[Batch], None]:
    """Refuses rows without a task, or of another than those known, before anything trains."""

    def check(batch: Batch) -> None:
        for row, name in zip(batch.row_ids, task_names(batch, column, technique), strict=True):
            if known is not None and name not in known:
                raise LuthierError(
                    f"the row `{row}` is of the task `{name}`, which is none of {', '.join(known)}",
                    where=f"{technique}: weights",
                    fix="name every task of the rows there, with its weight",
                )

    return check


def _without_task(row: str, column: str, technique: str) -> LuthierError:
    return LuthierError(
        f"{row} has no `{column}`, which should say what task it is of",
        where=f"{technique}: column",
        fix=f"give every row a key `{column}` with its task's name, or name the key that the rows have",
    )


def shares_of(key_K: Tensor, known: Mapping[str, float], option: str, fix: str) -> Tensor:
    """The tasks' weights, divided by their sum: [K] in fp64; all 0 where the sum is.

    Args:
        key_K: seeds of the tasks' names.
        known: weights by name.
        option: where the names come from, for errors.
        fix: how to add one.

    Raises:
        LuthierError: a task has no weight.
    """
    by_key = {seed_of(name): weight for name, weight in known.items()}
    if any(key not in by_key for key in key_K.tolist()):
        raise LuthierError(f"a row of this step is of a task that is none of {', '.join(known)}", where=option, fix=fix)
    weight_K = torch.tensor([by_key[key] for key in key_K.tolist()], dtype=torch.float64)
    total = weight_K.sum()
    return weight_K / total if bool(total) else weight_K


def spread(table: StepTable, task_M: Tensor, share_K: Tensor, by: Unit) -> Tensor:
    """Weights of labels with which a step's loss is the sum over tasks of a share times the task's mean loss.

    A step's loss is divided by its labels whose weight is above 0: where the shares add up to 1, the mean weight of these is 1.

    Args:
        table: the step.
        task_M: each label's task.
        share_K: the tasks' shares, in fp64.
        by: what a task's loss is a mean over.

    Returns:
        The weights [M], in fp64.
    """
    if by == "tokens":
        size_M = task_M.bincount(minlength=len(share_K))[task_M]
    else:
        targets_R = table.targets_by_row()
        task_R = torch.zeros_like(targets_R).index_put((table.row_M,), task_M)
        size_M = task_R.bincount(minlength=len(share_K))[task_M] * targets_R[table.row_M]
    share_M = share_K[task_M]
    return share_M * (share_M > 0).sum() / size_M
