"""SpIEL: sparse fine-tuning that drops the entries which learned least and grows others (Ansell et al., 2024), algorithm 1."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Callback, Now, Place, Refresh, Select, Selective, Services, State
from luthier.kinds.parts import Parts
from luthier.methods.selective import _growth as growth
from luthier.registry import method


@method(
    title="SpIEL",
    paper="arXiv:2401.16405",
    row=41,
    reduces_to="a density of 1 with nothing exchanged: full fine-tuning of the linear maps",
    departs="candidates come from the first whole step of a gathering phase, not its first micro-batch; new entries are corrected at "
    "their own age, where the authors' code is a step young; a model in bf16 computes with the rounded sum of weight and delta",
    merges="is in place",
    learning_rate=2e-4,
    replication="spiel",
)
def spiel(
    *,
    density: float = 0.01,
    target_modules: tuple[str, ...] = ("linear",),
    criterion: Literal["gradient", "momentum"] = "gradient",
    every: int = 20,
    gather: int = 5,
    drop: float = 0.2,
    policy: Literal["linear", "cosine"] = "linear",
) -> tuple[Selective, Callback]:
    """Train scattered entries; now and then exchange those that changed least for as many that promise most.

    What is dropped goes back to its value before training, which weight decay pulls towards as well.

    Args:
        density: parameters that train, as a share of all the model's parameters, spread over the weights by their size: about as many
            as LoRA of rank 64 has, as in the paper. At most, all numbers of the weights train.
        target_modules: module types or groups of them of the weights; all linear maps of the blocks, as in the paper.
        criterion: what tells where entries grow. `gradient` (SpIEL-AG): the gradient, summed over the steps of a gathering phase;
            new entries begin with the moments it would have given them. `momentum` (SpIEL-MA): the product of a row's and a
            column's SM3 accumulators, for which no dense gradient is formed; the paper pairs it with `step: sm3`.
        every: steps from one exchange to the next; the paper's S, 20.
        gather: steps from each multiple of `every` to the exchange, over which gradients are gathered; the paper's gamma, 5.
        drop: share of the entries that the linear policy would exchange at the very start, the paper's 0.2. Its first exchange
            replaces all entries, which were drawn by chance.
        policy: how the share falls to zero over the run: in a straight line, as in the paper, or along half a cosine.

    Raises:
        LuthierError: an option is out of its range.
    """
    if not 0.0 < density <= 1.0:
        raise LuthierError(f"the density is {density}", where="spiel: density", fix="use more than 0 and at most 1, e.g. 0.01")
    if not 0 < gather < every:
        raise LuthierError(
            f"gathering over {gather} steps does not fit between exchanges every {every} steps",
            where="spiel: gather",
            fix="use 1 or more, and fewer than `every`",
        )
    if not 0.0 <= drop <= 1.0:
        raise LuthierError(f"the share to drop is {drop}", where="spiel: drop", fix="use 0 to 1")
    share_of = {"linear": _linear, "cosine": _cosine}[policy]
    grow = {"gradient": growth.grow_by_gradient, "momentum": growth.grow_by_momentum}[criterion]

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        places = parts.select(target_modules=target_modules)
        counts = _budget(density, places, services)
        return {p: Select("flat", _drawn(services, p, k), decay="start") for p, k in zip(places, counts, strict=True)}

    def observing(now: Now) -> bool:
        return (now.step + 1) % every <= gather

    def refresh(state: State, services: Services) -> dict[Place, Refresh]:
        done, steps = services.now.step + 1, services.now.steps
        changed: dict[Place, Refresh] = {}
        # Entries that join at the very end would never learn.
        if done % every == gather and done < steps:
            share = share_of(drop, done, steps, gather)
            for one in services.trained():
                count = int(one.master.numel() * share)
                if one.slot == services.slot and one.place is not None and count:
                    new = grow(state, services, one, count)
                    changed |= {} if new is None else {one.place: new}
        if done % every >= gather:
            growth.forget_gathered(state)
        return changed

    if criterion == "momentum":
        callback = Callback(growth.keep_momenta, start=growth.no_momenta, needs=frozenset({"gradients"}))
        return Selective(choose, refresh=refresh), callback
    return Selective(choose, growth.gather, observing, refresh), Callback(start=growth.count_entries)


def _linear(drop: float, done: int, steps: int, first: int) -> float:
    return 1.0 if done == first else drop * (1.0 - done / steps)


def _cosine(drop: float, done: int, steps: int, first: int) -> float:
    return drop * (1.0 + math.cos(math.pi * done / steps)) / 2


def _budget(density: float, places: list[Place], services: Services) -> list[int]:
    """How many entries of each weight train, at least one."""
    sizes = [services.shape(place).numel() for place in places]
    wanted = int(density * sum(services.shape(place).numel() for place in services.parts.places))
    return [min(size, max(1, wanted * size // sum(sizes))) for size in sizes]


def _drawn(services: Services, place: Place, count: int) -> Tensor:
    drawn = torch.randperm(services.shape(place).numel(), generator=services.rng(f"entries {place}"))
    return drawn[:count].sort().values
