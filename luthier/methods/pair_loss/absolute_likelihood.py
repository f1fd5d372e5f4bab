"""Aligned Supervised Fine-Tuning (Wang et al., 2024): each answer by itself is likely or not, without a comparison."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._odds import log_rest
from luthier.registry import method


@method(
    title="Aligned Supervised Fine-Tuning (absolute likelihood)",
    paper="arXiv:2409.10571",
    row=90,
    reduces_to="beta 0: cross-entropy of the chosen answers, a mean over each answer's tokens",
    departs="mean log-likelihoods are taken to be at most -1e-7",
    learning_rate=5e-6,
)
def absolute_likelihood(*, beta: float = 0.1, weight: float = 1.0) -> PairLoss:
    """Learn the chosen answer and unlearn the rejected one, each by its own odds. The pull on either does not depend on the other.

    With p the mean likelihood of a token (geometric), the loss is -(1 + beta) log p(chosen) - beta log(1 - p(rejected)). Rejected
    answers are pushed the more the likelier they are.

    Args:
        beta: weight of what odds say; 0.1 as in ORPO.
        weight: multiplies the term where there are several.
    """

    def loss(pairs: Pairs) -> Tensor:
        return -(1.0 + beta) * pairs.chosen.mean_P - beta * log_rest(pairs.rejected.mean_P)

    return PairLoss(loss, weight=weight)
