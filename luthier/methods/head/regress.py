"""A head that learns a number, with squared errors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Batch, Head, Services, Tensors, Term, View
from luthier.registry import method
from luthier.rows.free_columns import check_numbers


@method(title="Regression", departs="the head starts at zero, where transformers draws it", learning_rate=1e-4)
def regress(*, column: str = "label", head_rate: float = 1.0, weight: float = 1.0) -> tuple[Head, Term]:
    """Learn a number of each text, from the last hidden state of its last token, with the mean squared error.

    The head has no bias, as that of `AutoModelForSequenceClassification` for decoders: numbers far from 0 are learnt better when their mean
    is taken out of the rows first.

    Args:
        column: the key of the rows that holds the number.
        head_rate: multiplies the learning rate of the head.
        weight: multiplies the term where there are several.
    """

    def start(services: Services) -> Tensors:
        return {"weight": torch.zeros(1, services.parts.width)}

    def read(own: Tensors, hidden_BD: Tensor) -> Tensor:
        return functional.linear(hidden_BD, own["weight"])

    def total(view: View, own: Tensors) -> Tensor:
        error_B = view.outputs_BK[:, 0] - view.batch.columns[column].to(view.outputs_BK)
        view.note_groups("absolute error", error_B.abs())
        return error_B.square().sum()

    def check(batch: Batch) -> None:
        check_numbers(batch, column, f"add `{column}` to every row")

    return (
        Head(start, read, "value", rate=head_rate),
        Term(total, unit="row", count=lambda batch: float(len(batch.row_ids)), columns=(), weight=weight, check=check),
    )
