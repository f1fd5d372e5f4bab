"""The logistic loss of a preference whose label may be wrong."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def smoothed_logistic(logit_P: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid of each logit, and of its negative as far as labels are taken to be the wrong way round.

    Args:
        logit_P: of the preference, of pairs or whatever is compared.
        smoothing: the share of wrong labels, from 0 to below a half.
    """
    return -(1.0 - smoothing) * logsigmoid(logit_P) - smoothing * logsigmoid(-logit_P)
