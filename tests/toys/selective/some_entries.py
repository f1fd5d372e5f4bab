"""A toy of sparse fine-tuning (Ansell et al., 2024, section 3): scattered entries; the least changed leave, others join
where the gradient is large."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import Now, Place, Refresh, Select, Selective, Services, State
from luthier.kinds.parts import Parts
from luthier.registry import method


@method(title="Some entries", merges="is in place")
def some_entries(
    *, target_modules: tuple[str, ...] = ("mlp_down",), share: float = 0.05, every: int = 2, churn: float = 0.25
) -> Selective:
    """Train scattered entries and exchange some of them now and then.

    Args:
        target_modules: module types or groups of them.
        share: how much of each weight trains.
        every: steps from one exchange to the next.
        churn: how much of what trains is exchanged.
    """

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        chosen = {}
        for place in parts.select(target_modules=target_modules):
            numbers = services.weight(place).numel()
            drawn = torch.randperm(numbers, generator=services.rng(f"entries {place}"))
            chosen[place] = Select("flat", drawn[: max(2, int(share * numbers))].sort().values)
        return chosen

    def observe(state: State, place: Place, gradient_OI: Tensor) -> None:
        state[f"gradient {place}"] = gradient_OI.clone()

    def observing(now: Now) -> bool:
        return (now.step + 1) % every == 0

    def refresh(state: State, services: Services) -> dict[Place, Refresh]:
        changed = {}
        for one in services.trained() if observing(services.now) else ():
            seen = f"gradient {one.place}" in state
            if one.slot == services.slot and one.place is not None and one.index is not None and seen:
                count = max(1, int(churn * len(one.index)))
                order = (one.master.detach() - services.start_weight(one.place)).abs().argsort(stable=True)
                stay = order[count:].sort().values
                size = state[f"gradient {one.place}"].abs().flatten()
                size[one.index] = -1.0
                grown = size.argsort(descending=True, stable=True)[:count]
                index, take = torch.cat([one.index[stay], grown]), torch.cat([stay, torch.full_like(grown, -1)])
                changed[one.place] = Refresh(index, take)
        return changed

    return Selective(choose, observe, observing, refresh)
