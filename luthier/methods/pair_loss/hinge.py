"""The hinge loss of SLiC-HF (Zhao et al., 2023), on the margin over the reference as in RSO (Liu et al., 2023)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(
    title="Hinge loss over pairs",
    paper="arXiv:2309.06657",
    departs="beta in the place of the paper's gamma",
    learning_rate=1e-6,
)
def hinge(*, beta: float = 0.1, weight: float = 1.0) -> PairLoss:
    """Push a pair until its margin over the reference is 1 / beta, and then leave it alone.

    Args:
        beta: one over the margin that is enough, in nats; 0.05 in RSO.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "hinge")

    def loss(pairs: Pairs) -> Tensor:
        return relu(1.0 - beta * pairs.margin_P)

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
