"""DiscoPOP (Lu et al., 2024): a loss that a language model found."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.errors import LuthierError
from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method


@method(
    title="Discovered Preference Optimization",
    paper="arXiv:2406.08414",
    reduces_to="temperature near 0 with every margin below 0: dpo",
    learning_rate=1e-6,
)
def discopop(*, beta: float = 0.05, temperature: float = 0.05, weight: float = 1.0) -> PairLoss:
    """DPO's loss where a pair is the wrong way round, and an exponential one where it is right, mixed by the margin itself.

    Args:
        beta: as for `dpo`; 0.05 in the paper.
        temperature: tau, how sharply the mixture turns from one to the other; 0.05 in the paper.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "discopop")
    if not temperature > 0.0:
        raise LuthierError(f"the temperature is {temperature}", where="discopop: temperature", fix="use more than 0")

    def loss(pairs: Pairs) -> Tensor:
        logit_P = beta * pairs.margin_P
        share_P = (logit_P / temperature).sigmoid()
        return -logsigmoid(logit_P) * (1.0 - share_P) + (-logit_P).exp() * share_P

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
