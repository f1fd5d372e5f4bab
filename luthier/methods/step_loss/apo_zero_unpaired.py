"""Anchored Preference Optimization, zero (D'Oosterlinck et al., 2024), for answers that need not be paired."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.kinds import Batch, RowMap, RowTable, Services, StepLoss, Tensors, View
from luthier.methods.pair_loss._checks import check_beta
from luthier.methods.step_loss._unpaired import by_themselves, check_verdicts
from luthier.registry import method
from luthier.rows.free_columns import check_numbers
from luthier.rows.shapes import Row


@method(
    title="Anchored Preference Optimization, zero, unpaired",
    paper="arXiv:2408.06266",
    reduces_to="a liked and a disliked answer to one prompt: half of apo_zero",
    departs="each answer by itself, as in TRL's KTOTrainer, where the paper has both of a pair",
    learning_rate=5e-7,
)
def apo_zero_unpaired(
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, column: str = "label", weight: float = 1.0
) -> tuple[StepLoss, RowMap]:
    """Make liked answers likelier and disliked ones less likely than the reference has them: for liked answers that are better than the
    model's own.

    Rows are a prompt and an answer (`prompt` and `completion`, or `messages`) with a label, true where the answer is liked. Unlike `kto`
    it needs no answers to other prompts beside them.

    Args:
        beta: as for `dpo`.
        desirable_weight: weight of the liked answers.
        undesirable_weight: weight of the others.
        column: the key of the rows that holds the label.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range, or a row has no label, prompt or answer.
    """
    check_beta(beta, "apo_zero_unpaired")
    check_verdicts(desirable_weight, undesirable_weight, "apo_zero_unpaired")

    def map(rows: Sequence[Row], services: Services) -> list[Row]:
        return by_themselves(rows, column, "apo_zero_unpaired")

    def value(view: View, own: Tensors) -> Tensor:
        return view.gains()

    def loss(table: RowTable) -> Tensor:
        up_R = (beta * table.value).sigmoid()
        return torch.where(table.columns[column] > 0, desirable_weight * (1.0 - up_R), undesirable_weight * up_R).sum()

    def check(batch: Batch) -> None:
        check_numbers(batch, column, "say true or false of every row", called="label")

    return StepLoss(value, loss, reference=True, weight=weight, check=check), RowMap(map)
