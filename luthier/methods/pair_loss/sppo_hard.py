"""Self-Play Preference Optimization (Wu et al., 2024), with hard labels."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(
    title="Self-Play Preference Optimization, hard labels",
    paper="arXiv:2405.00675",
    departs="the loss of one round over given pairs, whose chosen answer wins with probability 1; the paper estimates it",
    learning_rate=5e-7,
)
def sppo_hard(*, beta: float = 0.001, weight: float = 1.0) -> PairLoss:
    """Bring the chosen answer's gain on the reference to 1 / (2 beta) nats and the rejected one's to minus that, each by itself.

    Args:
        beta: one over the paper's eta, which is 1000.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "sppo_hard")

    def loss(pairs: Pairs) -> Tensor:
        return (pairs.chosen.gained_P - 0.5 / beta).square() + (pairs.rejected.gained_P + 0.5 / beta).square()

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
