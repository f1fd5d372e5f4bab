"""A toy edit that all places share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.kinds import Place, RepresentationEdit, Services, Tensors
from luthier.registry import method


@method(title="One vector", merges="never", learning_rate=1e-3)
def one_vector(*, scale: float = 1.0) -> RepresentationEdit:
    """Add one vector behind every block, at each by a number of its own.

    Args:
        scale: multiplies what is added.
    """

    def shared(places: Sequence[Place], services: Services) -> Tensors:
        return {"vector": torch.randn(services.parts.width, generator=services.rng("vector"))}

    def start(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
        return {"much": torch.zeros(1)}

    def apply(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return y + scale * tensors["much"] * tensors["vector"]

    return RepresentationEdit(start, apply, ("block",), shared=shared)
