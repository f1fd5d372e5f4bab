"""Deltas `up @ core @ down` whose two bases stand still: the R x R core between them is all that trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from luthier.kinds import Place, Services, Tensors, WeightDelta


def frozen_basis(start: Callable[[Place, Tensor, Services], Tensors], target_modules: tuple[str, ...]) -> WeightDelta:
    """A delta with a trained core.

    Args:
        start: makes the bases `down` [R, I] and `up` [O, R], which do not train, and the `core` [R, R], which does.
        target_modules: where deltas are added; module types or groups of them.
    """
    return WeightDelta(start, apply, delta, target_modules=target_modules, factors=factors, frozen=frozenset({"down", "up"}))


def apply(tensors: Tensors, x: Tensor) -> Tensor:
    """The change of a linear map's output: [..., I] to [..., O]."""
    return functional.linear(functional.linear(functional.linear(x, tensors["down"]), tensors["core"]), tensors["up"])


def delta(tensors: Tensors) -> Tensor:
    """The same change as a weight [O, I]."""
    return tensors["up"] @ tensors["core"] @ tensors["down"]


def factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The same change as `up @ down`, with the core in `down` [R, I]."""
    return tensors["core"] @ tensors["down"], tensors["up"]
