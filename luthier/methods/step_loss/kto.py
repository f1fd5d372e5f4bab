"""Kahneman-Tversky Optimization (Ethayarajh et al., 2024): answers that are liked or not, without pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.kinds import Batch, RowMap, RowTable, Services, StepLoss, Tensors, View
from luthier.methods.pair_loss._checks import check_beta
from luthier.methods.step_loss._unpaired import beside_other_answers, check_verdicts
from luthier.registry import method
from luthier.rows.free_columns import check_numbers
from luthier.rows.shapes import Row


@method(
    title="Kahneman-Tversky Optimization",
    paper="arXiv:2402.01306",
    departs="the KL divergence is estimated over the whole step, so that no split of it into micro-batches or processes changes it, from "
    "each prompt with the answer to the next row, which stays the same over epochs",
    learning_rate=5e-7,
)
def kto(
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, column: str = "label", weight: float = 1.0
) -> tuple[StepLoss, RowMap]:
    """Raise liked answers, and lower disliked ones, against how much the model has moved from the reference in general.

    Rows are a prompt and an answer (`prompt` and `completion`, or `messages`) with a label, true where the answer is liked. How far the
    model moved is estimated on answers to other prompts, which are run beside each row: a step costs twice the tokens.

    Args:
        beta: as for `dpo`.
        desirable_weight: weight of the liked answers. With n_liked and n_disliked rows, desirable_weight x n_liked / (undesirable_weight x
            n_disliked) should be between 1 and 4/3, the paper finds.
        undesirable_weight: weight of the others.
        column: the key of the rows that holds the label.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range, or a row has no label, prompt or answer.
    """
    check_beta(beta, "kto")
    check_verdicts(desirable_weight, undesirable_weight, "kto")

    def map(rows: Sequence[Row], services: Services) -> list[Row]:
        return beside_other_answers(rows, column, "kto")

    def value(view: View, own: Tensors) -> Tensor:
        return view.gains()

    def loss(table: RowTable) -> Tensor:
        own_G, other_G = table.sides()
        gained_G = table.value[own_G]
        moved = table.value[other_G].detach().mean().clamp(min=0.0)
        is_liked_G = table.columns[column][own_G] > 0
        up_G, down_G = (beta * (gained_G - moved)).sigmoid(), (beta * (moved - gained_G)).sigmoid()
        return torch.where(is_liked_G, desirable_weight * (1.0 - up_G), undesirable_weight * (1.0 - down_G)).sum()

    def check(batch: Batch) -> None:
        check_numbers(batch, column, "say true or false of every row", called="label")

    return StepLoss(value, loss, unit="group", reference=True, weight=weight, check=check), RowMap(map)
