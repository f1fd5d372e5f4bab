"""A toy selection whose entries are drawn anew now and then, and keep what they learnt when they leave."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import Place, Refresh, Select, Selective, Services, State
from luthier.kinds.parts import Parts
from luthier.registry import method


@method(title="Kept entries", merges="is in place")
def keep_entries(*, target_modules: tuple[str, ...] = ("mlp_up",), share: float = 0.1, every: int = 2) -> Selective:
    """Train entries that are drawn anew now and then.

    Args:
        target_modules: module types or groups of them.
        share: how much of each weight trains at a time.
        every: steps from one draw to the next.
    """

    def draw(services: Services, place: Place) -> Tensor:
        numbers = services.weight(place).numel()
        drawn = torch.randperm(numbers, generator=services.rng(f"{place} {services.now.step}"))
        return drawn[: max(2, int(share * numbers))].sort().values

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {place: Select("flat", draw(services, place)) for place in parts.select(target_modules=target_modules)}

    def refresh(state: State, services: Services) -> dict[Place, Refresh]:
        changed = {}
        for one in services.trained() if (services.now.step + 1) % every == 0 else ():
            if one.slot == services.slot and one.place is not None and one.index is not None:
                index = draw(services, one.place)
                same = index[:, None] == one.index[None, :]
                changed[one.place] = Refresh(index, torch.where(same.any(1), same.int().argmax(1), -1))
        return changed

    return Selective(choose, refresh=refresh, leave="keep")
