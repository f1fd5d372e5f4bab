"""Places within a row: which of its targets stand at the top of some score."""

from __future__ import annotations

import torch
from torch import Tensor


def top_in_rows(score_N: Tensor, row_N: Tensor, keep_B: Tensor) -> Tensor:
    """True at the `keep_B` targets of each row with the highest scores, [N]; of equal ones the first in the row come first.

    Args:
        score_N: a score for each target.
        row_N: its row's place in the batch; within a row targets stand in their order.
        keep_B: how many to keep of each row.
    """
    order_N = score_N.sort(descending=True, stable=True).indices
    order_N = order_N[row_N[order_N].sort(stable=True).indices]
    count_B = row_N.bincount(minlength=len(keep_B))
    first_B = count_B.cumsum(0) - count_B
    sorted_N = row_N[order_N]
    rank_N = torch.arange(len(row_N), device=row_N.device) - first_B[sorted_N]
    kept_N = torch.zeros_like(row_N, dtype=torch.bool)
    kept_N[order_N] = rank_N < keep_B[sorted_N]
    return kept_N


def span_in_rows(value_N: Tensor, row_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The lowest value of each row and how far its highest is above it, [B] each; without meaning for rows without targets."""
    low_B = value_N.new_full((rows,), float("inf")).scatter_reduce(0, row_N, value_N, "amin")
    return low_B, value_N.new_full((rows,), float("-inf")).scatter_reduce(0, row_N, value_N, "amax") - low_B
