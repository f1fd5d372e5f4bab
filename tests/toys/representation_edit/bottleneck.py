"""A toy adapter behind every block (Houlsby et al., 2019, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Place, RepresentationEdit, Services, Tensors
from luthier.registry import method


@method(title="Bottleneck", merges="never", learning_rate=1e-3)
def bottleneck(*, width: int = 8) -> RepresentationEdit:
    """Add a small two-layer network to every block's output.

    Args:
        width: hidden units.
    """

    def start(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
        down = torch.randn(width, width_out, generator=services.rng(str(place))) / width_out**0.5
        return {"down": down, "up": torch.zeros(width_out, width)}

    def apply(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return y + functional.linear(functional.gelu(functional.linear(y, tensors["down"])), tensors["up"])

    return RepresentationEdit(start, apply, ("block",))
