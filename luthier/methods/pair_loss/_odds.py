"""Odds of likelihoods, from their logarithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLOSEST = -1e-7
"""A log-likelihood is taken to be at most this: at 0 the odds are infinite."""


def log_rest(log_P: Tensor) -> Tensor:
    """log(1 - exp(x)) of x below 0, by the form that keeps digits (Maechler, 2012)."""
    low_P = log_P.clamp(max=CLOSEST)
    near_P = low_P > -math.log(2.0)
    # Either form is given numbers at which its gradient is finite: of what is not taken 0 times infinity would be left.
    rising = (-torch.expm1(torch.where(near_P, low_P, -1.0))).log()
    return torch.where(near_P, rising, torch.log1p(-torch.exp(torch.where(near_P, -1.0, low_P))))


def log_odds(log_P: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    return log_P - log_rest(log_P)
