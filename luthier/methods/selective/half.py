"""Half Fine-Tuning (Hui et al., 2024), section 3: a random half of every block's matrices trains, the other half keeps the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from luthier.errors import LuthierError
from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts, expand_roles
from luthier.registry import method

CATEGORIES = (("attention",), ("mlp", "expert"), ("mixer", "linear_other"), ("norm",))

Unit = tuple[Place, int | None]
"""A matrix, or bias or norm: a whole place, or of a stack of experts' matrices that of one expert."""
Ticket = list[Unit]
"""What is drawn or left together: a matrix, or at the level of layers a whole block."""
Group = list[Ticket]
"""Tickets of which a share is drawn: one category of one block."""


@method(
    title="Half Fine-Tuning",
    paper="arXiv:2404.18466",
    row=8,
    reduces_to="share 1: full fine-tuning",
    departs="the paper gives a block rule for one half only: other shares round, then settle what is left over random blocks; "
    "norms inside attention join the lottery of norms",
    merges="is in place",
    learning_rate=2e-4,
    replication="half",
)
def half(
    *,
    share: float = 0.5,
    level: Literal["category", "layer", "model"] = "category",
    balance: Literal["tensors", "parameters"] = "tensors",
    embeddings: Literal["train", "freeze"] = "train",
    target_modules: tuple[str, ...] = ("linear", "expert", "norm"),
) -> Selective:
    """Train half of the matrices of every block and freeze the other half; a new stage draws new halves.

    A bias follows its matrix. Embedding, head and final norm stand outside the lottery. Each expert of a mixture has matrices of its own.

    Args:
        share: how much of each category trains; the paper finds 0.3 to 0.7 alike.
        level: where the lottery is held: in each category of each block (the paper's best), over whole blocks, or over all
            matrices of the model.
        balance: whether the share counts tensors, as the paper does, or their parameters (narrow key and value projections count less).
        embeddings: whether what stands outside the blocks trains, as in the paper.
        target_modules: module types or groups of them that take part in the lottery; others stay frozen, free for another technique.
    """
    if not 0.0 < share <= 1.0:
        raise LuthierError(f"the share is {share}", where="half: share", fix="use more than 0 and at most 1")

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        rng = services.rng("half")
        units = [unit for place in parts.select(target_modules) for unit in _units(place, services)]
        lotteries = {"category": _by_category, "layer": _by_layer, "model": _by_model}[level](parts, units)
        draw = _draw_tickets if balance == "tensors" else _draw_numbers
        drawn = [unit for groups in lotteries for ticket in draw(groups, share, rng, services) for unit in ticket]
        outside = [p for p in parts.by_block(None) if p.role not in ("other", "other_modality")] if embeddings == "train" else []
        return {**_with_biases(parts, _selected(drawn, services)), **{place: Select("whole") for place in outside}}

    return Selective(choose)


def _units(place: Place, services: Services) -> list[Unit]:
    shape = services.shape(place)
    return [(place, expert) for expert in range(shape[0])] if len(shape) == 3 else [(place, None)]


def _selected(drawn: Sequence[Unit], services: Services) -> dict[Place, Select]:
    """What trains at each place: all of it, or some experts' matrices."""
    experts: dict[Place, list[int]] = {}
    for place, expert in drawn:
        experts.setdefault(place, []).extend([] if expert is None else [expert])
    return {
        place: Select("rows", torch.tensor(sorted(some))) if 0 < len(some) < services.shape(place)[0] else Select("whole")
        for place, some in experts.items()
    }


def _by_category(parts: Parts, units: Sequence[Unit]) -> list[list[Group]]:
    """A lottery for each category, a group for each block."""
    drawn = [[unit for unit in units if unit[0].role in expand_roles(category)] for category in CATEGORIES]
    return [[[[unit] for unit in some if unit[0].block == block] for block in range(parts.blocks)] for some in drawn if some]


def _by_layer(parts: Parts, units: Sequence[Unit]) -> list[list[Group]]:
    return [[[[unit for unit in units if unit[0].block == block] for block in range(parts.blocks)]]]


def _by_model(parts: Parts, units: Sequence[Unit]) -> list[list[Group]]:
    return [[[[unit] for unit in units if unit[0].block is not None]]]


def _shuffled(count: int, rng: torch.Generator) -> list[int]:
    return torch.randperm(count, generator=rng).tolist()


def _draw_tickets(groups: list[Group], share: float, rng: torch.Generator, services: Services) -> list[Ticket]:
    """Every group gives its rounded-down share; what is still owed comes one each from random groups.

    For three matrices a block and a share of one half, that is 1 of 3 in the rounded-down half of the blocks and 2 of 3 in the rest.
    """
    sure = [math.floor(share * len(group)) for group in groups]
    owed = math.floor(share * sum(map(len, groups)) + 0.5) - sum(sure)
    for lucky in _shuffled(len(groups), rng)[:owed]:
        sure[lucky] += 1
    return [group[i] for group, count in zip(groups, sure, strict=True) for i in sorted(_shuffled(len(group), rng)[:count])]


def _draw_numbers(groups: list[Group], share: float, rng: torch.Generator, services: Services) -> list[Ticket]:
    """Tickets in random order, each taken while that brings the trained numbers closer to their share of what was seen so far."""
    drawn: list[Ticket] = []
    owed = 0.0
    for group in groups:
        sizes = [sum(_numbers(unit, services) for unit in ticket) for ticket in group]
        owed += share * sum(sizes)
        for i in _shuffled(len(group), rng):
            if sizes[i] / 2 <= owed:
                drawn.append(group[i])
                owed -= sizes[i]
    return drawn


def _numbers(unit: Unit, services: Services) -> int:
    place, expert = unit
    shape = services.shape(place)
    return shape.numel() if expert is None else shape[1:].numel()


def _with_biases(parts: Parts, drawn: Mapping[Place, Select]) -> dict[Place, Select]:
    """A bias follows its own matrix or norm."""
    wanted = {(place.module, place.start, place.tensor): select for place, select in drawn.items()}
    named = {p: (p.module, p.start, _matrix_of(p)) for p in parts.select(tensor=None)}
    return {p: wanted[name] for p, name in named.items() if name in wanted}


def _matrix_of(place: Place) -> str:
    """The tensor a bias belongs to: `weight`, or with several matrices in a module the one it is named after."""
    if not place.tensor.endswith("bias"):
        return place.tensor
    return place.tensor.removesuffix("bias").removesuffix("_") or "weight"
