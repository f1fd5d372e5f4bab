"""Direct Preference Optimization (Rafailov et al., 2023), with conservative labels (Mitchell, 2023)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta, check_share
from luthier.methods.pair_loss._logistic import smoothed_logistic
from luthier.registry import method


@method(
    title="Direct Preference Optimization",
    paper="arXiv:2305.18290",
    reduces_to="beta near 0: every pair pulls alike, by the difference of its log-likelihoods",
    departs="the reference is the model before this run's training, unless a part of the run brings another",
    learning_rate=1e-6,
    replication="dpo",
)
def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0, length_normalized: bool = False, weight: float = 1.0) -> PairLoss:
    """Make the chosen answer likelier than the rejected one, measured by how much each gained on the reference.

    The loss is -log sigmoid(beta x margin), ln 2 before training. It can fall while both answers become less likely: watch
    `chosen log-likelihood`, and put `cross_entropy` beside it, or use `rpo`, where it falls.

    Args:
        beta: how strongly the model is held to the reference; 0.1 to 0.5 in the paper.
        label_smoothing: share of the pairs that are taken to be labelled the wrong way round; 0 in the paper.
        length_normalized: compare mean log-likelihoods of a token instead of sums, as Tulu 3 does (arXiv:2411.15124); beta is then
            larger, 5 there.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "dpo")
    check_share(label_smoothing, "dpo", "label_smoothing")

    def loss(pairs: Pairs) -> Tensor:
        logit_P = beta * (pairs.mean_margin_P if length_normalized else pairs.margin_P)
        return smoothed_logistic(logit_P, label_smoothing)

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
