"""Coverage, the chance that one of several samples is the target, and what training for it leaves of a cross-entropy's gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError

LEAST, MOST = 1e-300, 690.0
"""Bounds of -log p between which fp64 has both p and 1 - p; beyond, the factor is 0 or 1."""


def coverage_factor(surprisal: Tensor, samples: int) -> Tensor:
    """F(N, p) = N (1 - p)^(N - 1) p / (1 - (1 - p)^N), computed in fp64, from -log p: 1 where p is small beside 1 / N, 0 where p is 1.

    It is the gradient of `-log(1 - (1 - p)^N)` as a multiple of that of `-log p`.

    Args:
        surprisal: -log p, of any shape; infinite where p is 0.
        samples: N.
    """

    def factor(surprisal: Tensor) -> Tensor:
        bounded = surprisal.clamp(LEAST, MOST)
        right = (-bounded).exp()
        log_wrong = torch.where(bounded < math.log(2.0), (-(-bounded).expm1()).log(), (-right).log1p())
        found: Tensor = samples * ((samples - 1) * log_wrong).exp() * right / -(samples * log_wrong).expm1()
        return found.clamp(max=1.0)

    return machine.computed_wide(factor, surprisal)


def check_samples(name: str, samples: int) -> None:
    """Refuse a number of samples that is none.

    Raises:
        LuthierError: it is below 1.
    """
    if samples < 1:
        raise LuthierError(f"`samples` is {samples}", where=f"{name}: samples", fix="use as many as will be drawn, 1 or more")
