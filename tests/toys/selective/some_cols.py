"""A toy selection: some input columns of every chosen weight."""

from __future__ import annotations

import torch

from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.registry import method


@method(title="Some columns", merges="is in place")
def some_cols(*, target_modules: tuple[str, ...] = ("attention_output",), every: int = 2, rate: float = 1.0) -> Selective:
    """Train every few input columns.

    Args:
        target_modules: module types or groups of them.
        every: distance from one trained column to the next.
        rate: multiplies the learning rate.
    """

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {
            place: Select("cols", torch.arange(0, services.weight(place).shape[1], every), rate)
            for place in parts.select(target_modules=target_modules)
        }

    return Selective(choose)
