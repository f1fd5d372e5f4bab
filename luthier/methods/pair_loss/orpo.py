"""Odds Ratio Preference Optimization (Hong et al., 2024)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.kinds import LossTerm, PairLoss, Pairs
from luthier.methods.loss_term.cross_entropy import cross_entropy
from luthier.methods.pair_loss._odds import log_odds
from luthier.registry import method


@method(
    title="Odds Ratio Preference Optimization",
    paper="arXiv:2403.07691",
    reduces_to="weight 0: cross-entropy of the chosen answers",
    departs="the supervised part is a mean over the chosen answers' tokens of the whole step, and of them alone: the prompt is not learnt, "
    "as it is in the authors' code",
    learning_rate=8e-6,
)
def orpo(*, weight: float = 0.1) -> tuple[LossTerm, PairLoss]:
    """Learn the chosen answers, and raise their odds above the rejected ones', in one stage and without a reference.

    It brings the cross-entropy along: use `objective: orpo`. Odds are p / (1 - p) of the mean likelihood of a token.

    Args:
        weight: lambda, multiplies the part about odds; the paper's 0.1.
    """

    def loss(pairs: Pairs) -> Tensor:
        return -logsigmoid(log_odds(pairs.chosen.mean_P) - log_odds(pairs.rejected.mean_P))

    return cross_entropy(), PairLoss(loss, weight=weight)
