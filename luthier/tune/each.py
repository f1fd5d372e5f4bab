"""A technique that knows matrices alone, at a stack of experts' matrices: each of them starts as if it stood alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Services, Tensors, WeightDelta


class _OfExpert:
    """What a technique may ask when it starts at one matrix of a stack: the clock, draws of its own, and that matrix."""

    def __init__(self, services: Services, place: Place, number: int) -> None:
        self._services, self._place, self.expert = services, place, number
        self.now, self.parts, self.slot = services.now, services.parts, services.slot

    def rng(self, key: str) -> torch.Generator:
        """A generator for this seed, stage, key and expert."""
        return self._services.rng(f"{key}, expert {self.expert}")

    def weight(self, place: Place) -> Tensor:
        """The expert's matrix [O, I]."""
        return self._services.weight(place)[self.expert] if place == self._place else self._services.weight(place)

    def shape(self, place: Place) -> torch.Size:
        """Its shape."""
        return self._services.shape(place)[1:] if place == self._place else self._services.shape(place)

    def __getattr__(self, name: str) -> Any:
        raise LuthierError(
            f"`{self.slot}` starts from what the model does with rows, and of one matrix among experts that is not known",
            where=str(self._place),
            fix="use lora there, or leave `expert` out of target_modules",
        )


def of_expert(values: Tensor, services: Services) -> Tensor:
    """What starts at the matrix in question, of a stack [E, ...] of them; the values themselves where a matrix stands alone."""
    return values if services.expert is None else values[services.expert]


def started_each(value: WeightDelta, place: Place, weight_EOI: Tensor, services: Services) -> Tensors:
    """The tensors with which a technique starts at each matrix of a stack, stacked by name: [E, ...].

    Raises:
        LuthierError: the technique needs more than the matrix to start, or starts with other shapes at other experts.
    """
    found = [value.start(place, one_OI, _OfExpert(services, place, number)) for number, one_OI in enumerate(weight_EOI)]  # type: ignore[arg-type]
    stacks = {name: [one[name] for one in found] for name in found[0]}
    for name, tensors in stacks.items():
        if len({one.shape for one in tensors}) > 1:
            raise LuthierError(
                f"`{services.slot}` starts with other shapes of `{name}` at other experts, which share one tensor",
                where=str(place),
                fix="use lora there, or leave `expert` out of target_modules",
            )
    return {name: torch.stack(tensors) for name, tensors in stacks.items()}
