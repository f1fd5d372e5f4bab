"""A toy low-rank delta that starts at the weight's largest singular vectors (Meng et al., 2024, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.registry import method


@method(title="Singular-vector start", step0="base up to rounding", learning_rate=1e-3)
def svd_start(*, rank: int = 4, target_modules: tuple[str, ...] = ("attention_query", "mlp_down")) -> WeightDelta:
    """Train the largest singular directions of each weight; the rest is frozen.

    Args:
        rank: R, how many.
        target_modules: module types or groups of them.
    """

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        left_OK, size_K, right_KI = torch.linalg.svd(weight_OI.to(wide), full_matrices=False)
        root_R = size_K[:rank].sqrt()
        return {"down": root_R[:, None] * right_KI[:rank], "up": left_OK[:, :rank] * root_R}

    def apply(tensors: Tensors, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, tensors["down"]), tensors["up"])

    def delta(tensors: Tensors) -> Tensor:
        return tensors["up"] @ tensors["down"]

    return WeightDelta(start, apply, delta, target_modules=target_modules, subtract=True, pair=("down", "up"))
