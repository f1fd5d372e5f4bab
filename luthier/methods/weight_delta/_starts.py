"""What starts of low-rank deltas share: singular vectors of a matrix, ranks that fit it, and work done once for all places."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Services

Found = TypeVar("Found")


class Singular(NamedTuple):
    """A matrix as `left_OK @ diag(size_K) @ right_KI`, the largest first; all of it or some of the K triplets."""

    left_OK: Tensor
    size_K: Tensor
    right_KI: Tensor

    def some(self, which: slice) -> Singular:
        """Some of the triplets."""
        return Singular(self.left_OK[:, which], self.size_K[which], self.right_KI[which])


def singular(matrix_OI: Tensor) -> Singular:
    """The thin singular value decomposition, in fp32 or wider."""
    return Singular(*torch.linalg.svd(widened(matrix_OI), full_matrices=False))


def widened(values: Tensor) -> Tensor:
    """The same values in fp32, or as they are where they are wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_positive(technique: str, option: str, value: int) -> None:
    """Refuse a rank, or another count, below 1."""
    if value < 1:
        raise LuthierError(f"`{option}` is {value}", where=f"{technique}: {option}", fix="use at least 1")


def check_rank(technique: str, rank: int, place: Place, matrix_OI: Tensor) -> None:
    """Refuse more singular vectors than a matrix has."""
    width_out, width_in = matrix_OI.shape
    if rank > min(width_out, width_in):
        raise LuthierError(
            f"a {width_out} x {width_in} matrix has fewer than {rank} singular vectors",
            where=f"{technique}: rank, {place}",
            fix=f"use at most {min(width_out, width_in)}, or leave this role out",
        )


def once(make: Callable[[Services], Found]) -> Callable[[Services], Found]:
    """Make what all places start from when the first of them asks.

    One pass over the model then serves every place, and sees it before any of them has changed it. The result lives as long as the
    services of the run that asked.
    """
    kept: WeakKeyDictionary[Services, Found] = WeakKeyDictionary()

    def find(services: Services) -> Found:
        if services not in kept:
            kept[services] = make(services)
        return kept[services]

    return find
