"""Efficient Exact Optimization (Ji et al., 2024), for pairs."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.errors import LuthierError
from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(
    title="Efficient Exact Optimization",
    paper="arXiv:2402.00856",
    departs="the form for pairs, whose labels are soft by `label_smoothing`",
    learning_rate=1e-6,
)
def exo(*, beta: float = 0.1, label_smoothing: float = 1e-3, weight: float = 1.0) -> PairLoss:
    """The reverse KL divergence from the model's preference to the labelled one, where DPO has the forward one.

    Args:
        beta: as for `dpo`.
        label_smoothing: epsilon, the probability that is left to the rejected answer; 1e-3 in the authors' code. At 0 the loss is infinite.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "exo")
    if not 0.0 < label_smoothing < 0.5:
        raise LuthierError(
            f"the label smoothing is {label_smoothing}", where="exo: label_smoothing", fix="use more than 0 and less than 0.5"
        )

    def loss(pairs: Pairs) -> Tensor:
        logit_P = beta * pairs.margin_P
        right_P = logit_P.sigmoid() * (logsigmoid(logit_P) - math.log(1.0 - label_smoothing))
        return right_P + (-logit_P).sigmoid() * (logsigmoid(-logit_P) - math.log(label_smoothing))

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
