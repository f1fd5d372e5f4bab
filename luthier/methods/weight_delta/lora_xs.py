"""LoRA-XS (Bałazy et al., 2024), section 3: W + s A R B with A and B from the singular vectors of W; only R trains."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.methods.weight_delta._frozen_basis import frozen_basis
from luthier.methods.weight_delta._starts import check_positive, check_rank, singular
from luthier.registry import method


@method(
    title="LoRA-XS",
    paper="arXiv:2405.17604",
    reduces_to="deviation 0: the first step starts at the base exactly",
    departs="an exact singular value decomposition where the paper's is randomized; s is part of the frozen basis",
    step0="on purpose not the base",
    learning_rate=4e-3,
    replication="lora_sb",
)
def lora_xs(
    *, rank: int = 16, alpha: float = 16.0, deviation: float = 1e-5, target_modules: tuple[str, ...] = ("linear",)
) -> WeightDelta:
    """Freeze the R largest singular vectors of each weight as bases and train the R x R matrix between them.

    A linear map costs R^2 trained numbers, however wide it is. Singular values stand on the side of the input, as in the authors'
    code: `down` is s diag(S) V^T, `up` is U.

    Args:
        rank: R, how many singular vectors; the paper uses 4 to 25 for encoders and 16 to 64 for language models.
        alpha: the delta is scaled by s = alpha / R; 16 as in the paper.
        deviation: standard deviation of the trained matrix at the start; 1e-5 as in the paper.
        target_modules: where deltas are added; module types or groups of them.
    """
    check_positive("lora_xs", "rank", rank)
    if deviation < 0.0:
        raise LuthierError(f"the deviation is {deviation}", where="lora_xs: deviation", fix="use 0 or more")

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        check_rank("lora_xs", rank, place, weight_OI)
        left_OR, size_R, right_RI = singular(weight_OI).some(slice(rank))
        core_RR = deviation * torch.randn(rank, rank, generator=services.rng(f"lora_xs {place}"))
        return {"down": alpha / rank * size_R[:, None] * right_RI, "core": core_RR, "up": left_OR}

    return frozen_basis(start, target_modules)
