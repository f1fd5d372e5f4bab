"""A head that tells classes apart, with cross-entropy."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Batch, Head, LossTerm, Pool, Tensors, View
from luthier.methods.head import _layer
from luthier.registry import method
from luthier.rows.labels import several


@method(
    title="Classification",
    departs="the last linear map starts at zero, so that every class is as likely at step 0, where transformers draws it",
    learning_rate=1e-4,
)
def classify(
    *,
    labels: tuple[str, ...],
    pool: Pool = "auto",
    label_smoothing: float = 0.0,
    head_learning_rate_factor: float = 1.0,
    weight: float = 1.0,
) -> tuple[Head, LossTerm]:
    """Learn which of several classes a text belongs to, from one of its last hidden states.

    Rows are `text` and `label`: one of the labels, or its number from 0. The head is saved with the run, with the labels, and is that of
    `AutoModelForSequenceClassification`: linear without a bias for causal models, with the family's own layer before it for encoders.

    Args:
        labels: the names of the classes, in the order of their numbers.
        pool: the state that is read: of the `first` token, the `last`, the `mean` of all, or `auto`, the last of a causal model and the
            first of an encoder.
        label_smoothing: share of the probability that is spread over all classes alike.
        head_learning_rate_factor: multiplies the learning rate of the head.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: there are fewer than two labels or one comes twice, or an option is out of range.
    """
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise LuthierError(f"the labels are {list(labels)}", where="classify: labels", fix="name two classes or more, each once")
    if not 0.0 <= label_smoothing < 1.0:
        raise LuthierError(
            f"the label smoothing is {label_smoothing}", where="classify: label_smoothing", fix="use at least 0 and less than 1"
        )
    number_of = {label: number for number, label in enumerate(labels)}

    def labelled(batch: Batch) -> list[str | float | None]:
        """Each row's label as it stands: a name, a number, or none."""
        names = batch.texts.get("label", ("",) * len(batch.row_ids))
        numbers = batch.columns["label"].tolist() if "label" in batch.columns else [None] * len(names)
        return [name or number for name, number in zip(names, numbers, strict=True)]

    def class_of(label: str | float | None) -> int | None:
        if isinstance(label, str):
            return number_of.get(label)
        return int(label) if label is not None and label in range(len(labels)) else None

    def total(view: View, own: Tensors) -> Tensor:
        logits_BK = view.outputs_BK
        label_B = torch.tensor([class_of(label) for label in labelled(view.batch)], device=logits_BK.device)
        view.note_groups("accuracy", (logits_BK.argmax(1) == label_B).to(logits_BK.dtype))
        return functional.cross_entropy(logits_BK, label_B, reduction="sum", label_smoothing=label_smoothing)

    def check(batch: Batch) -> None:
        for row, label in zip(batch.row_ids, labelled(batch), strict=True):
            if class_of(label) is None:
                many = isinstance(label, str) and several(label) is not None
                raise LuthierError(
                    f"the row's label is `{label}`, and the classes are {', '.join(labels)}",
                    where=f"row {row}",
                    fix="use objective: multi_label, for lists" if many else "add it to the labels, or fix the row",
                )

    return (
        Head(partial(_layer.start, len(labels)), _layer.read, "classes", pool, names=tuple(labels), rate=head_learning_rate_factor),
        LossTerm(total, unit="row", count=lambda batch: float(len(batch.row_ids)), columns=(), weight=weight, check=check),
    )
