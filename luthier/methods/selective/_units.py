"""Heads and channels as units: the slices of weights that belong to each, and what ranks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, Place, Select, Services
from luthier.kinds.parts import Parts
from luthier.methods.selective._entries import matrix


class Projection(NamedTuple):
    """A weight of which slices train, one for each unit: a head or a channel of the MLP."""

    role: str
    form: Literal["rows", "cols"]
    """Units are outputs or inputs of it."""
    reader: str
    """The role of the linear map of the same block that reads what the units compute."""


PROJECTIONS = {
    "value": Projection("attention_value", "rows", "attention_output"),
    "output": Projection("attention_output", "cols", "attention_output"),
    "up": Projection("mlp_up", "rows", "mlp_down"),
    "down": Projection("mlp_down", "cols", "mlp_down"),
}


class Cut(NamedTuple):
    """One place cut into `units` parts: `width` rows or columns each."""

    place: Place
    form: Literal["rows", "cols"]
    units: int
    width: int
    reader: Place
    """The linear map that reads what the units compute."""

    def norms(self, square: Tensor) -> Tensor:
        """Norms of the units, from the squares of features; neighboring features belong to one unit."""
        return square.reshape(self.units, -1).sum(1).sqrt()

    def slice_norms(self, values_OI: Tensor) -> Tensor:
        """Norms of the slices that would train."""
        return self.norms(values_OI.square().sum(1 if self.form == "rows" else 0))


def pool_of(name: str, parts: Parts, services: Services) -> list[Cut]:
    """The units of one projection in every block."""
    projection = PROJECTIONS[name]
    pool = []
    for place in parts.select(target_modules=(projection.role,)):
        size = matrix(place, services).shape[0 if projection.form == "rows" else 1]
        query, key_value, width = parts.heads_of(place.block)
        heads = {"attention_value": key_value, "attention_output": query}.get(place.role)
        if heads is not None and size != heads * width:
            raise _refusal(name, f"its width of {size} is not {heads} heads of {width}", str(place))
        readers = [one for one in parts.select((projection.reader,)) if one.block == place.block]
        if len(readers) != 1:
            raise _refusal(name, f"{len(readers)} linear maps read what it computes", str(place))
        units = size if heads is None else heads
        pool.append(Cut(place, projection.form, units, size // units, readers[0]))
    if not pool:
        raise _refusal(name, f"no weight has the role {projection.role} alone", parts.architecture)
    return pool


def _refusal(name: str, what: str, where: str) -> LuthierError:
    return LuthierError(f"`s2ft` cannot tell the units of `{name}`: {what}", where=where, fix=f"set {name}: 0")


def scores(by: str, pool: Sequence[Cut], services: Services, calibration: Callable[[], Sequence[Batch]]) -> Tensor:
    """A score for each unit of the pool, one place after another."""
    if by == "gradient":
        slopes = services.gradients(calibration(), [cut.place for cut in pool])
        return torch.cat([cut.slice_norms(slopes[cut.place]) for cut in pool])
    if by == "activation":
        return _activations(pool, calibration(), services)
    weights = torch.cat([cut.slice_norms(matrix(cut.place, services)) for cut in pool])
    return weights if by == "weight" else weights * _activations(pool, calibration(), services)


def _activations(pool: Sequence[Cut], batches: Sequence[Batch], services: Services) -> Tensor:
    """Norms of what the units compute. A key-value head counts with all query heads that share it."""
    squares: dict[Place, Tensor] = {}

    def add(reader: Place, x_NI: Tensor) -> None:
        square_I = x_NI.to(torch.promote_types(x_NI.dtype, torch.float32)).square().sum(0)
        squares[reader] = squares[reader] + square_I if reader in squares else square_I

    services.inputs(batches, [cut.reader for cut in pool], add)
    return torch.cat([cut.norms(squares[cut.reader]) for cut in pool])


def selects(pool: Sequence[Cut], drawn: Tensor) -> dict[Place, Select]:
    """Numbers of units in the pool as rows or columns of their places; places without any are left out."""
    chosen = {}
    ends = accumulate(cut.units for cut in pool)
    for cut, end in zip(pool, ends, strict=True):
        first = end - cut.units
        mine = drawn[(drawn >= first) & (drawn < end)] - first
        if len(mine):
            index = mine[:, None] * cut.width + torch.arange(cut.width, device=mine.device)
            chosen[cut.place] = Select(cut.form, index.flatten(), decay="start")
    return chosen
