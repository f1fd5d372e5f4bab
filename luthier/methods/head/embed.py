"""Embeddings whose negatives are the other texts of the step (van den Oord et al., 2018), at several sizes (Kusupati et al., 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from luthier.errors import LuthierError
from luthier.kinds import Batch, Head, RowTable, Services, StepLoss, Tensors, View
from luthier.registry import method


@method(
    title="Contrastive embeddings",
    paper="arXiv:1807.03748",
    reduces_to="sizes empty: the loss at the model's width alone",
    departs="negatives are the texts of the whole step, whatever its micro-batches and processes; sizes as in Matryoshka "
    "representation learning (arXiv:2205.13147), each counting alike",
    learning_rate=2e-5,
)
def embed(
    *, temperature: float = 0.05, pool: Literal["mean", "last", "first"] = "mean", sizes: tuple[int, ...] = (), weight: float = 1.0
) -> tuple[Head, StepLoss]:
    """Let the vector of a question lie near that of the text that answers it, and far from those of all other texts of the step.

    Rows are `query` and `positive`, maybe with `negatives`. A vector is the mean of a text's last hidden states, of length 1. Large steps
    have more negatives: `batch_rows` may be large, since a step is cut into micro-batches without changing the loss.

    Args:
        temperature: cosines are divided by it; 0.05 is usual.
        pool: the `mean` of all states of a text, its `last`, or its `first`, an encoder's token for whole texts.
        sizes: Matryoshka: the first so many numbers of a vector, made to length 1 again, shall do by themselves.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    if not temperature > 0.0:
        raise LuthierError(f"the temperature is {temperature}", where="embed: temperature", fix="use more than 0")
    if any(size < 1 for size in sizes):
        raise LuthierError(f"the sizes are {list(sizes)}", where="embed: sizes", fix="use 1 or more")

    def start(services: Services) -> Tensors:
        wide = [size for size in sizes if size > services.parts.output_width]
        if wide:
            raise LuthierError(
                f"vectors of this model have {services.parts.output_width} numbers, and {wide[0]} are asked for",
                where="embed: sizes",
                fix="leave larger sizes out",
            )
        return {}

    def read(own: Tensors, hidden_BD: Tensor) -> Tensor:
        return normalize(hidden_BD, dim=1)

    def value(view: View, own: Tensors) -> Tensor:
        return view.outputs_BK

    def loss(table: RowTable) -> Tensor:
        query_G = torch.tensor([group[0] for group in table.groups])
        text_M = torch.tensor([place for group in table.groups for place in group[1:]])
        starts = torch.tensor([0, *(len(group) - 1 for group in table.groups[:-1])]).cumsum(0)
        widths = dict.fromkeys((table.value.shape[1], *sizes))
        losses = [_apart(table.value[query_G], table.value[text_M], starts, size, temperature) for size in widths]
        return torch.stack(losses).mean()

    def check(batch: Batch) -> None:
        together = {place for group in batch.groups if len(group) > 1 for place in group}
        odd = next((row for place, row in enumerate(batch.row_ids) if place not in together), None)
        if odd is not None:
            raise LuthierError(
                "embeddings are learnt from a question and the text that answers it, and this row is none",
                where=f"row {odd}",
                fix="give rows with `query` and `positive`",
            )

    return Head(start, read, "vector", pool=pool), StepLoss(value, loss, unit="group", columns=(), weight=weight, check=check)


def _apart(query_GD: Tensor, text_MD: Tensor, right_G: Tensor, size: int, temperature: float) -> Tensor:
    """Cross-entropy of finding each question's text among all, summed over the questions, by the first so many numbers."""
    one_GS, other_MS = normalize(query_GD[:, :size], dim=1), normalize(text_MD[:, :size], dim=1)
    return cross_entropy(one_GS @ other_MS.t() / temperature, right_G, reduction="sum")
