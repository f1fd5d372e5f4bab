"""Regularized Preference Optimization (Liu et al., 2024): DPO, and the likelihood of the chosen answer beside it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.methods.pair_loss.dpo import dpo
from luthier.registry import method


@method(
    title="Regularized Preference Optimization",
    paper="arXiv:2405.16436",
    row=240,
    reduces_to="eta 0: dpo",
    departs="the two forms that the authors released differ in their coefficient, too: both are here as released",
    learning_rate=5e-7,
    replication="rpo",
)
def rpo(
    *, beta: float = 0.5, eta: float = 0.2, form: Literal["average", "cumulative"] = "average", weight: float = 1.0
) -> PairLoss:
    """DPO with a supervised part that keeps the chosen answers likely.

    Args:
        beta: as for `dpo`; 0.5 with the average form, 0.01 to 0.05 with the cumulative one.
        eta: weight of the supervised part; 0.2 with the average form, 0.005 with the cumulative one.
        form: `average`: eta times the mean negative log-likelihood of an answer's tokens (the authors' default), or `cumulative`:
            eta times beta times their sum (the paper's main text).
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "rpo")
    compared = dpo(beta=beta).loss

    def loss(pairs: Pairs) -> Tensor:
        supervised_P = -pairs.chosen.mean_P if form == "average" else -beta * pairs.chosen.log_likelihood_P
        return compared(pairs) + eta * supervised_P

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
