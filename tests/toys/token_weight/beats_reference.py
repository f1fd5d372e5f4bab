"""A toy selection of tokens: in every row those on which the model is worst compared with the base."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luthier.columns.targets import find_targets
from luthier.kinds import Batch, TokenWeight, View
from luthier.registry import method


@method(title="Beats the reference")
def beats_reference(*, share: float = 0.6) -> TokenWeight:
    """Count the share of each row's targets whose loss is largest compared with the base's.

    Args:
        share: how much of each row counts, rounded up.
    """

    def kept(row_N: Tensor, rows: int) -> Tensor:
        return torch.tensor([math.ceil(share * int(n)) for n in row_N.bincount(minlength=rows)], device=row_N.device)

    def weigh(view: View) -> Tensor:
        excess_N = view["nll"] - view["reference_nll"]
        order = excess_N.argsort(descending=True, stable=True)
        order = order[view.row_N[order].argsort(stable=True)]
        count_B = view.row_N.bincount(minlength=len(view.batch.row_ids))
        first_B = count_B.cumsum(0) - count_B
        rank_N = torch.empty_like(order)
        rank_N[order] = torch.arange(len(order), device=order.device) - first_B[view.row_N[order]]
        return (rank_N < kept(view.row_N, len(count_B))[view.row_N]).to(excess_N.dtype)

    def count(batch: Batch) -> Tensor:
        return kept(find_targets(batch).row_N, len(batch.row_ids))

    return TokenWeight(weigh, ("nll", "reference_nll"), count)
