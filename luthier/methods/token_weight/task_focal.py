"""MFTCoder's focal loss of tasks (Liu et al., 2023): tasks that the model finds hard count more."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import StepTable, TokenWeight
from luthier.methods.token_weight._tasks import Unit, check_tasks, spread, tasks_of
from luthier.registry import method


@method(
    title="Focal loss of tasks",
    paper="arXiv:2311.02303",
    row=251,
    reduces_to="gamma 0: task_balance",
    departs="it multiplies the task's mean cross-entropy, where the paper has the logarithm of the mean probability: the same where all "
    "labels are equally likely; the factor is a number without a gradient; means are over the whole step; alpha is 1; the paper's "
    "form for single rows is left out (`focal` is that of labels), and the released code has neither",
)
def task_focal(*, gamma: float = 2.0, by: Unit = "rows", column: str = "task") -> TokenWeight:
    """Weigh each task's mean loss by (1 - P)^gamma, where P is the mean probability that the model gives the task's labels.

    The loss is the mean over the step's tasks of (1 - P_k)^gamma L_k: what the model already knows adds less, and the loss is smaller
    than the cross-entropy. Probabilities come from a pass of their own, without gradients.

    Args:
        gamma: how strongly easy tasks are held out; 2 as in the focal loss (Lin et al., 2017), 0 not at all.
        by: what P and L are means over: `rows`, the task's rows, and in each its labels, or `tokens`, all the task's labels.
        column: the rows' free column that names their tasks, in texts or numbers.

    Raises:
        LuthierError: gamma is negative; a row has no task.
    """
    if gamma < 0.0:
        raise LuthierError(f"gamma is {gamma}", where="task_focal: gamma", fix="use 0 or more")

    def look(table: StepTable) -> Tensor:
        key_K, task_M = tasks_of(table, column, "task_focal")
        alike_K = torch.ones(len(key_K), dtype=torch.float64)
        part_M = spread(table, task_M, alike_K, by) * (-machine.widened(table["nll"])).exp() / max(1, len(table))
        probability_K = alike_K.new_zeros(len(key_K)).index_add(0, task_M, part_M)
        focus_K = (1.0 - probability_K).clamp(min=0.0) ** gamma
        return spread(table, task_M, focus_K / max(1, len(key_K)), by)

    return TokenWeight(columns=("nll",), look=look, check=check_tasks(column, "task_focal"))
