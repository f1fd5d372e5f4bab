"""What edits that scale channels share. They train gamma - 1, so that zero is the base and weight decay pulls towards it."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(hidden: Tensor, scale: Tensor) -> Tensor:
    """`(1 + scale) * hidden`, over the last dimension; `1 + scale` alone would lose small scales in bf16."""
    return torch.addcmul(hidden, hidden, scale)


def scaled_outputs(weight: Tensor, scale_O: Tensor) -> Tensor:
    """The weight of a linear map [O, I] or of a norm [O] whose outputs are scaled."""
    return torch.addcmul(weight, weight, scale_O.reshape(-1, *[1] * (weight.ndim - 1)))


def scaled_inputs(weight_OI: Tensor, scale_I: Tensor) -> Tensor:
    """The weight of a linear map whose inputs are scaled."""
    return torch.addcmul(weight_OI, weight_OI, scale_I)
