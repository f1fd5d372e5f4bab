"""MFTCoder's data-balanced losses (Liu et al., 2023), cases 3 and 4 of the authors' code: tasks count alike, whatever their size."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import StepTable, TokenWeight
from luthier.methods.token_weight._tasks import Unit, check_tasks, shares_of, spread, tasks_of
from luthier.registry import method


@method(
    title="Task balance",
    paper="arXiv:2311.02303",
    row=251,
    reduces_to="one task, by tokens: plain cross-entropy; one task, by rows: row_balance",
    departs="a task's mean is over the whole step, where the authors' code takes one for each micro-batch and process, which makes a "
    "rare task count by how the step was cut",
)
def task_balance(*, by: Unit = "tokens", column: str = "task", weights: dict[str, float] | None = None) -> TokenWeight:
    """Let every task of a step count by its weight, not by how much of the step it takes: L = sum of w_k L_k / sum of w_k.

    The sums are over the tasks that have labels in the step, so a task that is not there takes nothing from the others. It costs no
    pass. Rows of a task whose weight is 0 are not run.

    Args:
        by: `tokens`, L_k is the mean over the task's labels (case 3), or `rows`, the mean over its rows of each one's mean over its
            labels (case 4).
        column: the rows' free column that names their tasks, in texts or numbers.
        weights: w_k by the task's name, for all tasks; none: all alike, as in the paper.

    Raises:
        LuthierError: a weight is negative, or none is above 0; a row has no task or one without a weight.
    """
    if weights is not None and (any(weight < 0.0 for weight in weights.values()) or not any(weights.values())):
        raise LuthierError(
            f"the weights are {weights}", where="task_balance: weights", fix="use numbers from 0 up, at least one of them above 0"
        )

    def look(table: StepTable) -> Tensor:
        key_K, task_M = tasks_of(table, column, "task_balance")
        if weights is None:
            share_K = torch.full((len(key_K),), 1.0 / max(1, len(key_K)), dtype=torch.float64)
        else:
            share_K = shares_of(key_K, weights, "task_balance: weights", "name every task of the rows there, with its weight")
        return spread(table, task_M, share_K, by)

    known = None if weights is None else tuple(weights)
    return TokenWeight(look=look, check=check_tasks(column, "task_balance", known))
