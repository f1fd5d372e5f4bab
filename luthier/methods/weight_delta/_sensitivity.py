"""How much singular triplets matter, by the smoothed sensitivity of their numbers and its uncertainty, and pruning by that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.kinds import Place, Services, State, TrainedLike

Triplets = Mapping[Place, Mapping[str, TrainedLike]]
"""What trains at each place: `left` P [O, R], `values` lambda [R, 1] and `right` Q [R, I]."""


def triplets(services: Services) -> Triplets:
    """The technique's own tensors, by place and name."""
    found: dict[Place, dict[str, TrainedLike]] = {}
    for one in services.trained():
        if one.slot == services.slot and one.place is not None:
            found.setdefault(one.place, {})[one.name.rpartition(".")[2]] = one
    return found


def look(state: State, one: TrainedLike, beta1: float, beta2: float) -> None:
    """Smooth the sensitivity of each number of a tensor, and how far it is from its new mean; a tensor without gradient has none."""
    value = one.master.detach()
    now = torch.zeros_like(value) if one.gradient is None else (value * one.gradient).abs()
    for_mean, for_gap = f"sensitivity {one.name}", f"uncertainty {one.name}"
    mean = beta1 * state.get(for_mean, 0.0) + (1 - beta1) * now
    state[for_gap] = beta2 * state.get(for_gap, 0.0) + (1 - beta2) * (now - mean).abs()
    state[for_mean] = mean


def _score(state: State, one: TrainedLike) -> Tensor:
    score: Tensor = state[f"sensitivity {one.name}"] * state[f"uncertainty {one.name}"]
    return score


def importance(state: State, mine: Mapping[str, TrainedLike]) -> Tensor:
    """The importance of each triplet at one place: [R]."""
    left_OR, values_R1, right_RI = (_score(state, mine[name]) for name in ("left", "values", "right"))
    return values_R1[:, 0] + right_RI.mean(dim=1) + left_OR.mean(dim=0)


def prune(state: State, services: Services, budget: int) -> None:
    """Leave as many singular values as the budget says, those of the most important triplets, and set all others to zero."""
    mine = triplets(services)
    # A run whose steps were all skipped has no importances, and lambda is still zero.
    looked = any(key.startswith("sensitivity ") for key in state)
    if not looked or budget >= sum(len(tensors["values"].master) for tensors in mine.values()):
        return
    scores = [importance(state, tensors) for tensors in mine.values()]
    order = torch.cat(scores).argsort(descending=True, stable=True)
    goes = torch.ones(len(order), dtype=torch.bool, device=order.device)
    goes[order[:budget]] = False
    for tensors, goes_R in zip(mine.values(), goes.split([len(score) for score in scores]), strict=True):
        services.write(tensors["values"], tensors["values"].master.masked_fill(goes_R[:, None], 0.0))


def excess(step: int, first: int, last: int) -> float:
    """The share of the triplets to be pruned that is still allowed at a step, from 0: 1 up to `first`, 0 behind `last`, cubic between."""
    if step <= first:
        return 1.0
    if step > last:
        return 0.0
    return float((1 - (step - first) / (last - first)) ** 3)
