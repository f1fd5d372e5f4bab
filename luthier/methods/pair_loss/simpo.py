"""SimPO (Meng et al., 2024): preferences by mean log-likelihood, without a reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(
    title="Simple Preference Optimization",
    paper="arXiv:2405.14734",
    reduces_to="margin 0: -log sigmoid of beta times the difference of mean log-likelihoods",
    learning_rate=1e-6,
)
def simpo(*, beta: float = 2.0, margin: float = 1.0, weight: float = 1.0) -> PairLoss:
    """Make the chosen answer likelier a token than the rejected one, by a margin. Nothing holds the model near where it started.

    Args:
        beta: multiplies the difference of mean log-likelihoods; 2.0 to 10 in the paper.
        margin: gamma, how much larger the chosen answer's reward shall be; the paper has a half to one time of beta.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "simpo")

    def loss(pairs: Pairs) -> Tensor:
        return -logsigmoid(beta * (pairs.chosen.mean_P - pairs.rejected.mean_P) - margin)

    return PairLoss(loss, weight=weight)
