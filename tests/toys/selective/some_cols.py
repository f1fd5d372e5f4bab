"""A toy selection: some input columns of every chosen weight."""

from __future__ import annotations

import torch

from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.registry import method


@method(title="Some columns", merges="is in place")
def some_cols(*, roles: tuple[str, ...] = ("attention_output",), every: int = 2, rate: float = 1.0) -> Selective:
    """Train every few input columns.

    Args:
        roles: roles or groups of roles.
        every: distance from one trained column to the next.
        rate: multiplies the learning rate.
    """

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {
            place: Select("cols", torch.arange(0, services.weight(place).shape[1], every), rate)
            for place in parts.select(roles=roles)
        }

    return Selective(choose)
