"""LoRA (Hu et al., 2021), section 4.1: W + s B A, with A [R, I] random and B [O, R] zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from luthier import draws
from luthier.errors import LuthierError
from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.registry import method


@method(
    title="LoRA",
    paper="arXiv:2106.09685",
    departs="adds to every linear map of a block, as later work found best, where the paper adapts query and value; "
    "`rank_stabilized` scales by alpha / sqrt(R) (arXiv:2312.03732)",
    learning_rate=1e-3,
    replication="lora",
)
def lora(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] = ("linear",),
    rank_stabilized: bool = False,
) -> WeightDelta:
    """Freeze the weights and train a low-rank delta beside each linear map.

    Args:
        rank: R, the rank of each delta.
        alpha: the delta is scaled by alpha / R.
        dropout: probability of dropping an input feature of the delta while training.
        target_modules: where deltas are added; module types or groups of them.
        rank_stabilized: scale by alpha / sqrt(R), which keeps the size of the update when the rank changes.
    """
    if rank < 1:
        raise LuthierError(f"the rank is {rank}", where="lora: rank", fix="use at least 1")
    if not 0.0 <= dropout < 1.0:
        raise LuthierError(f"the dropout is {dropout}", where="lora: dropout", fix="use 0 to below 1")
    scale = alpha / math.sqrt(rank) if rank_stabilized else alpha / rank

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        width_out, width_in = weight_OI.shape
        if rank > max(width_out, width_in):
            raise LuthierError(
                f"a rank of {rank} is no low rank of a {width_out} x {width_in} matrix",
                where=f"lora: rank, {place}",
                fix=f"use at most {min(width_out, width_in)}",
            )
        bound = 1.0 / math.sqrt(width_in)
        down_RI = torch.empty(rank, width_in).uniform_(-bound, bound, generator=services.rng(f"lora {place}"))
        return {"down": down_RI, "up": torch.zeros(width_out, rank)}

    def apply(tensors: Tensors, x: Tensor) -> Tensor:
        # Scaled where it is narrow.
        return functional.linear(functional.linear(draws.dropout(x, dropout), tensors["down"]) * scale, tensors["up"])

    def delta(tensors: Tensors) -> Tensor:
        return scale * tensors["up"] @ tensors["down"]

    return WeightDelta(start, apply, delta, target_modules=target_modules, pair=("down", "up"), scale=scale, draws=dropout > 0.0)
