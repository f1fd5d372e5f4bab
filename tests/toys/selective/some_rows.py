"""A toy selection: some output rows of every chosen tensor, biases too."""

from __future__ import annotations

import torch

from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.registry import method


@method(title="Some rows", merges="is in place")
def some_rows(*, target_modules: tuple[str, ...] = ("mlp_down",), every: int = 2) -> Selective:
    """Train every few output rows.

    Args:
        target_modules: module types or groups of them.
        every: distance from one trained row to the next.
    """

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        places = parts.select(target_modules=target_modules, tensor=None)
        return {place: Select("rows", torch.arange(0, len(services.weight(place)), every)) for place in places}

    return Selective(choose)
