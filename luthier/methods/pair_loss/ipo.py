"""Identity Preference Optimization (Azar et al., 2023)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(
    title="Identity Preference Optimization",
    paper="arXiv:2310.12036",
    reduces_to="length_normalized false: the paper's sums over tokens",
    departs="margins are of means over an answer's tokens, which TRL's authors learned from the paper's to be what was run there",
    learning_rate=1e-6,
)
def ipo(*, beta: float = 0.1, length_normalized: bool = True, weight: float = 1.0) -> PairLoss:
    """Bring the margin over the reference to 1 / (2 beta), and no further: pairs that are certain do not pull for ever.

    Args:
        beta: the paper's tau; the smaller, the larger the margin that is aimed at.
        length_normalized: the margin is that of mean log-likelihoods of a token, in nats, instead of sums.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "ipo")

    def loss(pairs: Pairs) -> Tensor:
        return ((pairs.mean_margin_P if length_normalized else pairs.margin_P) - 1.0 / (2.0 * beta)).square()

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
