"""Noise that keeps to the size of what it disturbs, number by number, and the blocks that stand it best or worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, pi, sqrt

import torch
from torch import Tensor

from luthier import machine
from luthier.kinds import Batch, Services

STEEPNESS = 0.1
"""How fast the noise fades with the distance from the token's median, in median distances."""
LARGEST_FACTOR = 5.0
"""Most that a token's spread may multiply its noise with."""
FLOOR = 1e-6
"""Least median distance, relative to the token's norm; also what is added to the noise that a signal is divided by."""

Scale = Callable[[Tensor, Tensor], Tensor]
"""Hidden states [B, T, D] and their own tokens [B, T] to the standard deviation of the noise on each number, [B, T, D]."""


def relative_scale(hidden_BTD: Tensor, own_BT: Tensor) -> Tensor:
    """Median distance from the token's median x a weight that is largest near the median x a factor that grows with the token's variance
    relative to the row's mean; as large as the hidden states. In fp32 or wider."""
    x_BTD = _own(hidden_BTD, own_BT)
    apart_BTD = (x_BTD - x_BTD.median(-1, keepdim=True).values).abs()
    floor_BT1 = (FLOOR * x_BTD.norm(dim=-1, keepdim=True)).clamp(min=torch.finfo(x_BTD.dtype).tiny)
    typical_BT1 = apart_BTD.median(-1, keepdim=True).values.maximum(floor_BT1)
    variance_BT1 = x_BTD.var(-1, keepdim=True)
    mean_B11 = variance_BT1.sum(1, keepdim=True) / own_BT.sum(1).clamp(min=1)[:, None, None]
    ratio_BT1 = variance_BT1 / mean_B11.clamp(min=torch.finfo(x_BTD.dtype).tiny)
    # Limited before it grows: an infinite factor would have no gradient.
    factor_BT1 = ratio_BT1.clamp(max=log(LARGEST_FACTOR)).exp()
    return typical_BT1 * (-STEEPNESS * apart_BTD / typical_BT1).exp() * factor_BT1


def absolute_scale(hidden_BTD: Tensor, own_BT: Tensor) -> Tensor:
    """The same times the standard deviation of all numbers of the row, which has no gradient: as large as the states' square."""
    x_BTD = _own(hidden_BTD.detach(), own_BT)
    count_B = own_BT.sum(1) * x_BTD.shape[-1]
    mean_B11 = (x_BTD.sum((1, 2)) / count_B.clamp(min=1))[:, None, None]
    squares_B = ((x_BTD - mean_B11) * own_BT[..., None]).square().sum((1, 2))
    spread_B = (squares_B / (count_B - 1).clamp(min=1)).sqrt()
    return relative_scale(hidden_BTD, own_BT) * spread_B[:, None, None]


def _own(hidden_BTD: Tensor, own_BT: Tensor) -> Tensor:
    wide_BTD = hidden_BTD.to(torch.promote_types(hidden_BTD.dtype, torch.float32))
    return torch.where(own_BT[..., None], wide_BTD, torch.zeros((), dtype=wide_BTD.dtype, device=wide_BTD.device))


def signal_to_noise(services: Services, batches: Sequence[Batch], scale: Scale, noise_std: float) -> list[float]:
    """For each block mean |h| / (mean |noise| + 1e-6) over all own tokens of the batches, with the noise's expectation."""
    signal, noise = [0.0] * services.parts.blocks, [0.0] * services.parts.blocks
    count = sum(int(batch.own_tokens().sum()) for batch in batches) * services.parts.width

    def take(block: int, hidden_BTD: Tensor, own_BT: Tensor) -> None:
        signal[block] += machine.total(_own(hidden_BTD, own_BT).abs())
        noise[block] += machine.total(scale(hidden_BTD, own_BT) * own_BT[..., None])

    services.block_outputs(batches, take)
    # A normal number is sqrt(2 / pi) standard deviations away from 0 in the mean.
    expected = [noise_std * sqrt(2.0 / pi) * one / count for one in noise]
    return [one / count / (other + FLOOR) for one, other in zip(signal, expected, strict=True)]
