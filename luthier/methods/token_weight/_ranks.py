"""Places within a row: which of its labels stand at the top of some score."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_in_rows(row_N: Tensor, rows: int) -> Tensor:
    """Which of its row's labels each is, from 0, [N].

    Args:
        row_N: each label's row; within a row labels stand in their order.
        rows: of the batch.
    """
    order_N = row_N.sort(stable=True).indices
    # Not counted by values, which are none where only shapes are run.
    count_B = row_N.new_zeros(rows).index_add(0, row_N, torch.ones_like(row_N))
    first_B = count_B.cumsum(0) - count_B
    rank_N = torch.empty_like(row_N)
    rank_N[order_N] = torch.arange(len(row_N), device=row_N.device) - first_B[row_N[order_N]]
    return rank_N


def top_in_rows(score_N: Tensor, row_N: Tensor, keep_B: Tensor) -> Tensor:
    """True at the `keep_B` labels of each row with the highest scores, [N]; of equal ones the first in the row come first.

    Args:
        score_N: a score for each label.
        row_N: its row's place in the batch; within a row labels stand in their order.
        keep_B: how many to keep of each row.
    """
    order_N = score_N.sort(descending=True, stable=True).indices
    kept_N = torch.zeros_like(row_N, dtype=torch.bool)
    kept_N[order_N] = rank_in_rows(row_N[order_N], len(keep_B)) < keep_B[row_N[order_N]]
    return kept_N


def span_in_rows(value_N: Tensor, row_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The lowest value of each row and how far its highest is above it, [B] each; without meaning for rows without labels."""
    low_B = value_N.new_full((rows,), float("inf")).scatter_reduce(0, row_N, value_N, "amin")
    return low_B, value_N.new_full((rows,), float("-inf")).scatter_reduce(0, row_N, value_N, "amax") - low_B
