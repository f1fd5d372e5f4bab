"""Robust DPO (Chowdhury et al., 2024): an unbiased loss under labels of which a known share is wrong."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta, check_share
from luthier.registry import method


@method(
    title="Robust DPO",
    paper="arXiv:2403.00409",
    reduces_to="wrong 0: dpo",
    learning_rate=1e-6,
)
def robust(*, beta: float = 0.1, wrong: float = 0.1, weight: float = 1.0) -> PairLoss:
    """DPO whose mean over pairs with some labels turned round is what it would be without.

    Args:
        beta: as for `dpo`.
        wrong: share of the labels that are the wrong way round, which has to be known; 0.1 in the paper.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "robust")
    check_share(wrong, "robust", "wrong")

    def loss(pairs: Pairs) -> Tensor:
        logit_P = beta * pairs.margin_P
        return (wrong * logsigmoid(-logit_P) - (1.0 - wrong) * logsigmoid(logit_P)) / (1.0 - 2.0 * wrong)

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
