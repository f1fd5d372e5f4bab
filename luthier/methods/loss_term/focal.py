"""The focal loss of whole rows (Liu et al., 2023, MFTCoder): rows that the model knows count less."""

from __future__ import annotations

import math

from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import LossTerm, Tensors, View
from luthier.registry import method

LEAST_MISSING = 1e-12
"""Smallest 1 - q: a power below 1 has no slope at 0."""


@method(
    title="Focal loss of rows",
    paper="arXiv:2311.02303",
    row=251,
    reduces_to="gamma 0: minus the logarithm of each row's mean token probability",
    departs="without the factor of a row's task; the released code has no focal loss",
)
def focal(*, gamma: float = 2.0) -> LossTerm:
    """Learn each row by `-(1 - q)^gamma log q`, with q the mean probability of its labels, so that hard rows come first.

    The loss is a mean over rows. Token weights weigh the mean that q is, and what a row's labels weigh in the mean multiplies its
    loss; labels of weight 0 are as if they were none.

    Args:
        gamma: the power; 2 in the paper that introduced focal loss (Lin et al., 2017).

    Raises:
        LuthierError: `gamma` is negative.
    """
    if gamma < 0.0:
        raise LuthierError(f"`gamma` is {gamma}", where="focal: gamma", fix="use 0 or more, e.g. 2")

    def total(view: View, own: Tensors) -> Tensor:
        weight_B = view.sum_rows(view.weight_N)
        kept_B = view.sum_rows((view.weight_N != 0).to(weight_B.dtype))
        some_B = weight_B > 0
        # q of a long, unlikely row underflows: its sum is scaled by its largest member.
        log_N = view.weight_N.log() - view["nll"]
        top_B = (
            log_N.new_full(weight_B.shape, -math.inf).scatter_reduce(0, view.row_N, log_N.detach(), "amax").nan_to_num(neginf=0.0)
        )
        sum_B = view.sum_rows((log_N - top_B[view.row_N]).exp())
        log_q_B = sum_B[some_B].log() + top_B[some_B] - weight_B[some_B].log()
        missing_B = (-log_q_B.expm1()).clamp(min=LEAST_MISSING)
        return -((weight_B / kept_B)[some_B] * missing_B**gamma * log_q_B).sum()

    return LossTerm(total, unit="row")
