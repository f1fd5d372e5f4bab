"""Attention heads ranked by how far their scales moved, and offsets at some of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from luthier import machine
from luthier.kinds import Place, Resize, Services, Tensors


def top_heads(scale_LHW: Sequence[Tensor], count: int, learning_rate: float) -> list[tuple[int, int]]:
    """The heads whose scales have the largest L2 norms, as (layer, head), best first; ties go to the first.

    Warns when no head's scales went as far as half a step of the learning rate: then the order is the optimizer's noise.
    """
    score_LH = torch.stack([machine.widened(scale_HW).norm(dim=1).cpu() for scale_HW in scale_LHW])
    noise = 0.5 * learning_rate * scale_LHW[0].shape[1] ** 0.5
    if float(score_LH.max()) < noise:
        warnings.warn(
            f"LoFiT: the heads' scores are noise (the largest is {float(score_LH.max()):.2g}); lower the penalty or select for longer",
            stacklevel=2,
        )
    order = score_LH.flatten().sort(descending=True, stable=True).indices[:count].tolist()
    return [divmod(one, score_LH.shape[1]) for one in order]


def offsets(layer: int, chosen: Sequence[tuple[int, int]], place: Place, deviation: float, services: Services) -> Resize:
    """What stands at a layer in the second phase: an offset for each chosen head, or nothing."""
    heads = [head for where, head in chosen if where == layer]
    if not heads:
        return Resize({})
    width = services.parts.head_width
    offset_KW = deviation * torch.randn(len(heads), width, generator=services.rng(f"offset {place}"))
    return Resize({"heads": torch.tensor(heads), "offset": offset_KW})


def shift(tensors: Tensors, channels: int) -> Tensor:
    """Offsets of the chosen heads, zero at the others, as one vector over the channels of all heads."""
    heads_K, offset_KW = tensors["heads"], tensors["offset"]
    shift_HW = offset_KW.new_zeros(channels // offset_KW.shape[1], offset_KW.shape[1])
    return shift_HW.index_copy(0, heads_K, offset_KW).flatten()
