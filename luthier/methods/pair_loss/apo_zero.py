"""Anchored Preference Optimization, zero (D'Oosterlinck et al., 2024)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(title="Anchored Preference Optimization, zero", paper="arXiv:2408.06266", learning_rate=1e-6)
def apo_zero(*, beta: float = 0.1, weight: float = 1.0) -> PairLoss:
    """Make the chosen answer likelier and the rejected one less likely than the reference has them: for answers that are better than the
    model's own.

    Args:
        beta: as for `dpo`.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "apo_zero")

    def loss(pairs: Pairs) -> Tensor:
        return 1.0 - (beta * pairs.chosen.gained_P).sigmoid() + (beta * pairs.rejected.gained_P).sigmoid()

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
