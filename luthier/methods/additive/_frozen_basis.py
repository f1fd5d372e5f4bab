"""Deltas `up @ core @ down` whose two bases stand still: the R x R core between them is all that trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from luthier.kinds import Additive, Place, Services, Tensors


def frozen_basis(start: Callable[[Place, Tensor, Services], Tensors], roles: tuple[str, ...]) -> Additive:
    """A delta with a trained core.

    Args:
        start: makes the bases `down` [R, I] and `up` [O, R], which do not train, and the `core` [R, R], which does.
        roles: where deltas are added; roles or groups of roles.
    """
    return Additive(start, apply, delta, roles=roles, factors=factors, frozen=frozenset({"down", "up"}))


def apply(tensors: Tensors, x: Tensor) -> Tensor:
    """The change of a linear map's output: [..., I] to [..., O]."""
    return functional.linear(functional.linear(functional.linear(x, tensors["down"]), tensors["core"]), tensors["up"])


def delta(tensors: Tensors) -> Tensor:
    """The same change as a weight [O, I]."""
    return tensors["up"] @ tensors["core"] @ tensors["down"]


def factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The same change as `up @ down`, with the core in `down` [R, I]."""
    return tensors["core"] @ tensors["down"], tensors["up"]
