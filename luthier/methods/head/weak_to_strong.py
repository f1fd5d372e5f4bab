"""Weak-to-strong generalization with the confidence loss (Burns et al., 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, Head, Now, RowTable, StepLoss, Tensors, View
from luthier.methods.head.classify import classify
from luthier.registry import method
from luthier.rows.free_columns import check_numbers


@method(
    title="Weak-to-strong confidence loss",
    paper="arXiv:2312.09390",
    row=60,
    reduces_to="most 0: cross-entropy with the weak model's soft labels",
    departs="the share of the own predictions rises linearly, as in the paper, where the code jumps; the threshold is taken over the "
    "whole step, whatever its micro-batches; two classes, as in the code",
    learning_rate=1e-5,
)
def weak_to_strong(
    *, labels: tuple[str, str], column: str = "weak", most: float = 0.5, warmup: float = 0.2, weight: float = 1.0
) -> tuple[Head, StepLoss]:
    """Learn from a weak model's soft labels, and more and more from the model's own predictions, made hard, to become better than it.

    Own predictions are made hard at the threshold at which as many rows of the step are in each class as the weak labels say.

    Args:
        labels: the names of the two classes.
        column: the key of the rows that holds the weak model's probability of the second class.
        most: weight of the own predictions behind the warm-up; 0.5 in the paper, 0.75 for large models.
        warmup: share of the run in which it rises from 0; the paper's 0.2.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    if not 0.0 <= most <= 1.0:
        raise LuthierError(f"the share is {most}", where="weak_to_strong: most", fix="use 0 to 1")
    if not 0.0 <= warmup <= 1.0:
        raise LuthierError(f"the warm-up is {warmup}", where="weak_to_strong: warmup", fix="use a share from 0 to 1")
    if len(labels) != 2:
        raise LuthierError(f"the labels are {list(labels)}", where="weak_to_strong: labels", fix="name two classes")
    head = next(value for value in classify(labels=labels) if isinstance(value, Head))

    def value(view: View, own: Tensors) -> Tensor:
        return view.outputs_BK

    def loss(table: RowTable) -> Tensor:
        log_RK, weak_R = table.value.log_softmax(1), table.columns[column].to(table.value)
        share = most * _risen(table.now, warmup)
        target_R = (1.0 - share) * weak_R + share * hardened(log_RK[:, 0].exp(), weak_R)
        return -((1.0 - target_R) * log_RK[:, 0] + target_R * log_RK[:, 1]).sum()

    def check(batch: Batch) -> None:
        fix = f"add `{column}`, from 0 to 1, to every row"
        check_numbers(batch, column, fix, called="probability", least=0.0, most=1.0)

    return head, StepLoss(value, loss, columns=(), weight=weight, check=check)


def hardened(first_R: Tensor, weak_R: Tensor) -> Tensor:
    """1 for rows of the second class, 0 for the first, so that their share is the mean of the weak labels; from the probability of the
    first class."""
    is_second_R = first_R < torch.quantile(first_R, weak_R.mean())
    return torch.where(is_second_R, torch.ones_like(weak_R), torch.zeros_like(weak_R))


def _risen(now: Now, warmup: float) -> float:
    return min(1.0, now.step / (warmup * now.steps)) if warmup else 1.0
