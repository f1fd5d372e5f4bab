"""How far two distributions over the vocabulary are from each other, from their log-probabilities."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from luthier.columns.losses import kl

Direction = Literal["forward", "reverse", "js"]


def with_rest(log_CV: Tensor, place_CK: Tensor) -> Tensor:
    """Log-probabilities of some tokens and of all others together, [C, K + 1]; of all tokens [C, K]."""
    some_CK = log_CV.gather(1, place_CK)
    if place_CK.shape[1] >= log_CV.shape[1]:
        return some_CK
    return torch.cat([some_CK, log_CV.scatter(1, place_CK, -math.inf).logsumexp(1, keepdim=True)], dim=1)


def divergence(theirs: Tensor, mine: Tensor, direction: Direction) -> Tensor:
    """In nats, [C], from log-probabilities [C, ...] of a teacher and of the model."""
    if direction == "forward":
        return kl(theirs, mine)
    if direction == "reverse":
        return kl(mine, theirs)
    middle = torch.logaddexp(theirs, mine) - math.log(2.0)
    return (kl(theirs, middle) + kl(mine, middle)) / 2.0
