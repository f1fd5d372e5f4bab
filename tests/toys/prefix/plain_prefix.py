"""A toy prefix: trained keys and values for every block (Li and Liang, 2021, section 4, without their network)."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import Prefix, Services, Tensors
from luthier.kinds.parts import Parts
from luthier.registry import method


@method(title="Plain prefix", step0="on purpose not the base", merges="never", learning_rate=1e-2)
def plain_prefix(*, length: int = 3, deviation: float = 0.5) -> Prefix:
    """Train keys and values that every query may attend to.

    Args:
        length: P, how many.
        deviation: standard deviation of their random start.
    """

    def start(parts: Parts, services: Services) -> Tensors:
        shape = (parts.blocks, parts.key_value_heads, length, parts.head_width)
        rng = services.rng("prefix")
        return {name: torch.randn(shape, generator=rng) * deviation for name in ("key_LHPW", "value_LHPW")}

    def keyvalue(tensors: Tensors, block: int) -> tuple[Tensor, Tensor]:
        return tensors["key_LHPW"][block], tensors["value_LHPW"][block]

    return Prefix(start, keyvalue)
