"""Supervised fine-tuning with other f-divergences (Wang et al., 2025), token by token."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import TokenLoss, View
from luthier.methods.token_loss._divergences import DIVERGENCES, Name, check_beta, note_stopped
from luthier.registry import method


@method(
    title="f-divergence fine-tuning",
    paper="arXiv:2507.00018",
    row=101,
    reduces_to="divergence linear, or a model that is still the base: the gradient of cross-entropy times beta",
    departs="the reward is each token's, where the derivation has the row's (`f_divergence_rows`); the loss is not divided by beta, so "
    "that beta also scales the gradient; the paper's constants could not be confirmed; below a reward of -0.9 the Hellinger loss is a "
    "straight line, where its conjugate ends at -1; the base runs without dropout, so that with dropout r is not 0 at the start",
    replication="f_divergence",
)
def f_divergence(*, divergence: Name = "chi2", beta: float = 1.0) -> TokenLoss:
    """Learn each token by how far the model has already moved from the base on it, so that something holds it there.

    The reward of a label is `r = beta * log(p / p_base)`. `linear` ignores it; `chi2` weighs the gradient by `max(0, 1 - r / 2)` and
    stops at 2; `chi2_unclipped` goes on with a negative weight, which unlearns; `hellinger` weighs by `1 / (1 + r)^2`. It costs one
    forward pass of the base without gradients. The log has the share of labels whose weight is 0 or below.

    Args:
        divergence: which; `chi2` by luthier's choice.
        beta: scales the reward; at 1 `chi2` stops where a token is e^2 times as likely as it was. Luthier's choice.

    Raises:
        LuthierError: `beta` is out of range.
    """
    check_beta("f_divergence", beta)
    chosen = DIVERGENCES[divergence]

    def loss(view: View) -> Tensor:
        reward_N = beta * (view["reference_nll"] - view["nll"])
        note_stopped(view, chosen.weight(reward_N))
        return chosen.phi(reward_N)

    return TokenLoss(loss, ("nll", "reference_nll"))
