"""A head that learns a number, with squared errors."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from luthier.kinds import Batch, Head, LossTerm, Pool, Tensors, View
from luthier.methods.head import _layer
from luthier.registry import method
from luthier.rows.free_columns import check_numbers


@method(title="Regression", departs="the last linear map starts at zero, where transformers draws it", learning_rate=1e-4)
def regress(
    *, column: str = "label", pool: Pool = "auto", head_learning_rate_factor: float = 1.0, weight: float = 1.0
) -> tuple[Head, LossTerm]:
    """Learn a number of each text, from one of its last hidden states, with the mean squared error.

    The head is that of `AutoModelForSequenceClassification`. For causal models it has no bias: numbers far from 0 are learned better when
    their mean is taken out of the rows first.

    Args:
        column: the key of the rows that holds the number.
        pool: the state that is read: of the `first` token, the `last`, the `mean` of all, or `auto`, the last of a causal model and the
            first of an encoder.
        head_learning_rate_factor: multiplies the learning rate of the head.
        weight: multiplies the term where there are several.
    """

    def total(view: View, own: Tensors) -> Tensor:
        error_B = view.outputs_BK[:, 0] - view.batch.columns[column].to(view.outputs_BK)
        view.note_groups("absolute error", error_B.abs())
        return error_B.square().sum()

    def check(batch: Batch) -> None:
        check_numbers(batch, column, f"add `{column}` to every row")

    return (
        Head(partial(_layer.start, 1), _layer.read, "value", pool, rate=head_learning_rate_factor),
        LossTerm(total, unit="row", count=lambda batch: float(len(batch.row_ids)), columns=(), weight=weight, check=check),
    )
