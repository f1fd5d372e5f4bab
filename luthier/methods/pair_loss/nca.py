"""Noise Contrastive Alignment (Chen et al., 2024), for pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(title="Noise Contrastive Alignment", paper="arXiv:2402.05369", departs="the form for pairs", learning_rate=1e-6)
def nca(*, beta: float = 0.01, weight: float = 1.0) -> PairLoss:
    """Classify each answer as the data's or the reference's: the chosen one counts for the data, both by halves for the reference. The
    likelihood of the chosen answer is kept from falling.

    Args:
        beta: as for `dpo`; 0.01 in the paper.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "nca")

    def loss(pairs: Pairs) -> Tensor:
        chosen_P, rejected_P = beta * pairs.chosen.gained_P, beta * pairs.rejected.gained_P
        return -logsigmoid(chosen_P) - 0.5 * logsigmoid(-chosen_P) - 0.5 * logsigmoid(-rejected_P)

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
