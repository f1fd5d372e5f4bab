"""A base and what was tuned from it, weight by weight: what probes look at, and what several of them compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier import machine
from luthier.delta import Delta
from luthier.delta.delta import places_of
from luthier.errors import LuthierError
from luthier.kinds import Place
from luthier.kinds.parts import Parts

Change = Callable[[], Tensor]
"""Makes the change of one parameter as it is stored, in fp32 or wider, when it is asked for."""


class Weights:
    """The weights of a base beside their changes, read one at a time: the `Comparison` that probes get.

    Args:
        model: the base, on the CPU or elsewhere.
        parts: its map.
        changes: by parameter name; what is absent did not change. `of_delta` and `of_models` make them.
        device: where the values are handed out; None: where they are.
    """

    def __init__(
        self, model: nn.Module, parts: Parts, changes: Mapping[str, Change], *, device: torch.device | str | None = None
    ) -> None:
        self.model, self.parts, self.changes, self.device = model, parts, changes, device

    @cached_property
    def changed(self) -> tuple[Place, ...]:
        """The places that hold other numbers than in the base: of a fused parameter only the parts that changed."""
        known = {place: order for order, place in enumerate(self.parts.places)}
        places = [place for name in self.changes for place in places_of(name, self.parts)]
        # A head whose tie was cut is in no map of the base; it stands last.
        places.sort(key=lambda place: known.get(place, len(known)))
        return tuple(place for place in places if bool(self.change(place).any()))

    def base(self, place: Place) -> Tensor:
        """The values before, [O, I]."""
        values = self.model.get_parameter(place.parameter).detach()
        return self._at(place, values.to(torch.promote_types(values.dtype, torch.float32)))

    def change(self, place: Place) -> Tensor:
        """What tuning added, [O, I]; zeros where nothing changed."""
        change = self.changes.get(place.parameter)
        return torch.zeros_like(self.base(place)) if change is None else self._at(place, change())

    def tuned(self, place: Place) -> Tensor:
        """The values after, [O, I]."""
        return self.base(place) + self.change(place)

    def _at(self, place: Place, values: Tensor) -> Tensor:
        return self.parts.outputs(place, values).to(self.device or values.device)


def of_delta(delta: Delta) -> dict[str, Change]:
    """The changes that a delta holds. No second model is needed, and low ranks are spread out one at a time."""
    return {name: partial(_spread, delta, name) for name in delta}


def of_models(base: nn.Module, parts: Parts, tuned: nn.Module, tuned_parts: Parts) -> dict[str, Change]:
    """The changes between two models in memory.

    Raises:
        LuthierError: they are of different architectures, or a parameter is missing or has another shape.
    """
    kinds = [(one.architecture, "causal" if one.causal else "encoder") for one in (parts, tuned_parts)]
    if kinds[0] != kinds[1]:
        raise LuthierError(
            "the base is a {} {} and the tuned model a {} {}".format(*kinds[0], *kinds[1]),
            where="base and tuned",
            fix="name the model that was tuned as the base",
        )
    before, after = _by_name(base), _by_name(tuned)
    # A tied tensor counts once, unless tuning cut the tie.
    names = dict.fromkeys(place.parameter for place in (*parts.places, *tuned_parts.places))
    changes: dict[str, Change] = {}
    for name in names:
        if name not in before or name not in after:
            which = "base" if name not in before else "tuned model"
            raise LuthierError(f"the {which} lacks this parameter", where=name, fix="name the model that was tuned as the base")
        if before[name].shape != after[name].shape:
            raise LuthierError(
                f"the shapes differ: {tuple(before[name].shape)} in the base, {tuple(after[name].shape)} in the tuned model",
                where=name,
                fix="name the model that was tuned as the base",
            )
        changes[name] = partial(_difference, before[name], after[name])
    return changes


def effective_rank(values_OI: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007): of R equal ones R, of zeros 0."""
    value_R = machine.widened(torch.linalg.svdvals(values_OI))
    return float(torch.special.entr(value_R / value_R.sum()).sum().exp()) if value_R.any() else 0.0


def summed(rows: Iterable[Mapping[str, Any]], by: str, column: str) -> list[dict[str, Any]]:
    """A table's column summed over the rows that agree in another, in order of appearance: `{by, places, column}` each."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row[column])
    return [{by: group, "places": len(some), column: sum(some)} for group, some in groups.items()]


def _spread(delta: Delta, name: str) -> Tensor:
    change = delta.spread(name)
    return change.to(torch.promote_types(change.dtype, torch.float32))


def _difference(before: Tensor, after: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return after.to(before.device, wide) - before.to(wide)


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    return {name: values.detach() for name, values in model.named_parameters(remove_duplicate=False)}
