"""The exact choice of what is worth its cost, where everything between the output and the earliest choice is paid for, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def select(through: Sequence[int], own: Sequence[int], value: Sequence[float], budget: int) -> list[bool]:
    """The exact choice of the largest value within a budget. Index 0 is nearest the output.

    For each tensor as the earliest that trains, its chain is paid first; the tensors behind it then fill what is left, as in an
    ordinary knapsack.

    Args:
        through: units to pass the gradient through each tensor, paid down to the earliest that trains.
        own: units for each tensor's own gradient, paid if it trains.
        value: what training it is worth; what is not above 0 is never chosen.
        budget: units that may be spent.
    """
    best = torch.zeros(budget + 1, dtype=torch.float64)
    """The largest value of the tensors seen so far, by units left for their own gradients."""
    takes: list[torch.Tensor] = []
    top, earliest, left, chain = 0.0, -1, 0, 0
    for k, (pass_on, cost, worth) in enumerate(zip(through, own, value, strict=True)):
        chain += pass_on
        # What is worth 0 or less never wins: with less room there is no more value.
        room = budget - chain - cost
        if room >= 0 and worth + float(best[room]) > top:
            top, earliest, left = worth + float(best[room]), k, room
        taken = torch.full_like(best, -torch.inf)
        if cost <= budget:
            taken[cost:] = best[: budget + 1 - cost] + worth
        takes.append(taken > best)
        best = torch.maximum(best, taken)
    chosen = [k == earliest for k in range(len(value))]
    for k in range(earliest - 1, -1, -1):
        if takes[k][left]:
            chosen[k], left = True, left - own[k]
    return chosen
