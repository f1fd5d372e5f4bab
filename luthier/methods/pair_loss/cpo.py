"""Contrastive Preference Optimization (Xu et al., 2024)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import LossTerm, PairLoss, Pairs
from luthier.methods.loss_term.cross_entropy import cross_entropy
from luthier.methods.pair_loss._checks import check_beta, check_share
from luthier.methods.pair_loss._logistic import smoothed_logistic
from luthier.registry import method


@method(
    title="Contrastive Preference Optimization",
    paper="arXiv:2401.08417",
    reduces_to="supervised 0: dpo whose reference finds every answer equally likely",
    departs="the supervised part is a mean over the chosen answers' tokens of the whole step",
    learning_rate=1e-6,
)
def cpo(*, beta: float = 0.1, label_smoothing: float = 0.0, supervised: float = 1.0) -> tuple[LossTerm, PairLoss]:
    """DPO without a reference, and cross-entropy of the chosen answers beside it, which holds them up.

    It brings the cross-entropy along: use `objective: cpo`.

    Args:
        beta: multiplies the difference of log-likelihoods; 0.1 in the paper.
        label_smoothing: share of the pairs that are taken to be labelled the wrong way round.
        supervised: weight of the cross-entropy; 1 in the paper.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "cpo")
    check_share(label_smoothing, "cpo", "label_smoothing")

    def loss(pairs: Pairs) -> Tensor:
        logit_P = beta * (pairs.chosen.log_likelihood_P - pairs.rejected.log_likelihood_P)
        return smoothed_logistic(logit_P, label_smoothing)

    return cross_entropy(weight=supervised), PairLoss(loss)
