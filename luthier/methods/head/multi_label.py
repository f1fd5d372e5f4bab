"""A head that tells which of several labels a text has, any number of them, with a sigmoid for each."""

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
    title="Classification with several labels",
    departs="the last linear map starts at zero, so that every label has a probability of one half at step 0, where transformers draws it",
    learning_rate=1e-4,
)
def multi_label(
    *,
    labels: tuple[str, ...],
    positive_weights: tuple[float, ...] = (),
    pool: Pool = "auto",
    head_learning_rate_factor: float = 1.0,
    weight: float = 1.0,
) -> tuple[Head, LossTerm]:
    """Learn which labels a text has, each by itself, with binary cross-entropy: a mean over the labels, and over the rows of the step.

    Rows are `text` and `label`: a list of labels or of their numbers from 0, in any order and maybe empty, or one. The head is that of
    `AutoModelForSequenceClassification`, as of `classify`. A label is named above a probability of one half.

    Args:
        labels: their names, in the order of their numbers.
        positive_weights: of each label, how much more a text that has it counts than one that has it not; rare labels get more than 1,
            such as the rows without it over those with it, but not more than about 10. None: 1.
        pool: as for `classify`.
        head_learning_rate_factor: multiplies the learning rate of the head.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: there is no label or one comes twice, or the weights are not one for each label.
    """
    if not labels or len(set(labels)) < len(labels):
        raise LuthierError(f"the labels are {list(labels)}", where="multi_label: labels", fix="name one label or more, each once")
    if positive_weights and (len(positive_weights) != len(labels) or any(not one > 0.0 for one in positive_weights)):
        raise LuthierError(
            f"the weights are {list(positive_weights)}, and there are {len(labels)} labels",
            where="multi_label: positive_weights",
            fix="give one above 0 for each label, or leave them out",
        )
    number_of = {label: number for number, label in enumerate(labels)}

    def marked(batch: Batch) -> list[list[object]]:
        """The labels of each row, as they stand there."""
        texts = batch.texts.get("label", ("",) * len(batch.row_ids))
        numbers = batch.columns["label"].tolist() if "label" in batch.columns else [None] * len(texts)
        return [
            ([text] if (many := several(text)) is None else many) if text else [one]
            for text, one in zip(texts, numbers, strict=True)
        ]

    def number(label: object) -> int | None:
        if isinstance(label, int | float) and label in range(len(labels)):
            return int(label)
        return number_of.get(label) if isinstance(label, str) else None

    def total(view: View, own: Tensors) -> Tensor:
        logits_BK = view.outputs_BK
        right_BK = torch.zeros_like(logits_BK)
        for row, some in enumerate(marked(view.batch)):
            known = [place for one in some if (place := number(one)) is not None]
            right_BK[row, torch.tensor(known, dtype=torch.int64, device=right_BK.device)] = 1.0
        scale_K = logits_BK.new_tensor(positive_weights or [1.0] * len(labels))
        is_right_BK = (logits_BK > 0.0) == right_BK.bool()
        view.note_groups("accuracy", is_right_BK.to(logits_BK.dtype).mean(1))
        loss_BK = functional.binary_cross_entropy_with_logits(logits_BK, right_BK, pos_weight=scale_K, reduction="none")
        return loss_BK.mean(1).sum()

    def check(batch: Batch) -> None:
        for row, some in zip(batch.row_ids, marked(batch), strict=True):
            unknown = [one for one in some if number(one) is None]
            if unknown:
                raise LuthierError(
                    f"the row has the label `{unknown[0]}`, and the labels are {', '.join(labels)}",
                    where=f"row {row}",
                    fix="add it to the labels, or fix the row",
                )

    return (
        Head(partial(_layer.start, len(labels)), _layer.read, "labels", pool, names=tuple(labels), rate=head_learning_rate_factor),
        LossTerm(total, unit="row", count=lambda batch: float(len(batch.row_ids)), columns=(), weight=weight, check=check),
    )
