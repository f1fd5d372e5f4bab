"""Anchored Preference Optimization, down (D'Oosterlinck et al., 2024)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(title="Anchored Preference Optimization, down", paper="arXiv:2408.06266", learning_rate=1e-6)
def apo_down(*, beta: float = 0.1, weight: float = 1.0) -> PairLoss:
    """Make the chosen answer less likely than the reference has it, and the rejected one still less: for chosen answers that are worse
    than the model's own.

    Args:
        beta: as for `dpo`.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "apo_down")

    def loss(pairs: Pairs) -> Tensor:
        return (beta * pairs.chosen.gained_P).sigmoid() + 1.0 - (beta * pairs.margin_P).sigmoid()

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
