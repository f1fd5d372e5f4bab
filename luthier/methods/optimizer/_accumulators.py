"""The accumulators of SM3 (Anil et al., 2019): one number for each row and each column, which bounds every entry's summed squares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def accumulators(shape: Sequence[int], like: Tensor) -> list[Tensor]:
    """Zeros for each axis, of the other tensor's type and device: for [O, I] rows [O, 1] and columns [1, I]; for a vector itself."""
    return [
        torch.zeros([size if axis == i else 1 for i, size in enumerate(shape)], dtype=like.dtype, device=like.device)
        for axis in range(len(shape))
    ]


def accumulate(sums: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """The bound of every entry, in the gradient's shape: the least of its accumulators plus its square. They rise to the bounds."""
    bound = reduce(torch.minimum, sums) + gradient.square()
    for axis, one in enumerate(sums):
        others = [other for other in range(bound.ndim) if other != axis]
        torch.maximum(one, bound.amax(others, keepdim=True) if others else bound, out=one)
    return bound


def accumulate_entries(rows_O1: Tensor, columns_1I: Tensor, index_K: Tensor, gradient_K: Tensor) -> Tensor:
    """The same for scattered entries of a matrix, by their places in the flattened [O, I]. Returns their bounds [K]."""
    row_K, column_K = index_K // columns_1I.shape[1], index_K % columns_1I.shape[1]
    bound_K = torch.minimum(rows_O1[row_K, 0], columns_1I[0, column_K]) + gradient_K.square()
    rows_O1.view(-1).scatter_reduce_(0, row_K, bound_K, "amax")
    columns_1I.view(-1).scatter_reduce_(0, column_K, bound_K, "amax")
    return bound_K
