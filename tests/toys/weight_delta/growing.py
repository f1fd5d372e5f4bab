"""A toy low-rank delta whose rank grows where the observed gradient is large."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Now, Place, Resize, Services, State, Tensors, WeightDelta
from luthier.registry import method


@method(title="Growing delta", learning_rate=1e-3)
def growing(*, rank: int = 2, most: int = 3, every: int = 2, target_modules: tuple[str, ...] = ("attention",)) -> WeightDelta:
    """Start with small deltas and let those with the larger gradients grow by one rank now and then.

    Args:
        rank: the rank at the start.
        most: the largest rank.
        every: steps from one growth to the next.
        target_modules: module types or groups of them.
    """

    def random(width: int, count: int, services: Services, key: str) -> Tensor:
        return torch.randn(count, width, generator=services.rng(key)).div(width**0.5)

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        width_out, width_in = weight_OI.shape
        return {"down": random(width_in, rank, services, str(place)), "up": torch.zeros(width_out, rank)}

    def apply(tensors: Tensors, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, tensors["down"]), tensors["up"])

    def delta(tensors: Tensors) -> Tensor:
        return tensors["up"] @ tensors["down"]

    def observe(state: State, place: Place, gradient_OI: Tensor) -> None:
        state[f"size {place}"] = float(gradient_OI.norm())

    def observing(now: Now) -> bool:
        return (now.step + 1) % every == 0

    def refresh(state: State, services: Services) -> dict[Place, Resize]:
        mine = [one.place for one in services.trained() if one.slot == services.slot and one.place is not None]
        seen = {place for place in mine if f"size {place}" in state}
        places = sorted(seen if observing(services.now) else (), key=lambda p: (-state[f"size {p}"], str(p)))
        grown = {}
        for place in places[: len(places) // 2]:
            down_RI, up_OR = (services.tensors(place)[name] for name in ("down", "up"))
            if len(down_RI) < most:
                new_I = random(down_RI.shape[1], 1, services, f"{place} {services.now.step}").to(down_RI)
                take = torch.tensor([*range(len(down_RI)), -1])
                tensors = {
                    "down": torch.cat([down_RI, new_I]),
                    "up": torch.cat([up_OR, up_OR.new_zeros(len(up_OR), 1)], 1),
                }
                grown[place] = Resize(tensors, {"down": take, "up": take})
        return grown

    axes = {"down": 0, "up": 1}
    return WeightDelta(start, apply, delta, target_modules, False, observe, observing, refresh, axes, pair=("down", "up"))
