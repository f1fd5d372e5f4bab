"""f-DPO (Wang et al., 2023): DPO whose distance to the reference is another f-divergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.errors import LuthierError
from luthier.kinds import PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method

MOST = 50.0
"""Log-ratios are taken to be at most this far from 0 where their exponential counts, so that it stays finite."""


def _alpha(gained_P: Tensor, alpha: float) -> Tensor:
    return -(-alpha * gained_P.clamp(-MOST, MOST)).exp() / alpha


SLOPES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda gained_P, alpha: gained_P,
    "forward_kl": lambda gained_P, alpha: -(-gained_P.clamp(-MOST, MOST)).exp(),
    "jensen_shannon": lambda gained_P, alpha: logsigmoid(gained_P),
    "alpha": _alpha,
}
"""f'(u) of each divergence at u = exp(log-ratio), up to constants, which cancel within a pair."""


@method(
    title="DPO with f-divergences",
    paper="arXiv:2309.16240",
    reduces_to="divergence reverse_kl: dpo",
    departs=f"log-ratios are taken to be at most {MOST:g} from 0 where their exponential counts",
    learning_rate=1e-6,
)
def f_dpo(
    *,
    beta: float = 0.1,
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "jensen_shannon",
    alpha: float = 0.5,
    weight: float = 1.0,
) -> PairLoss:
    """DPO in which the model is held to the reference by a divergence of your choice.

    Args:
        beta: as for `dpo`.
        divergence: which; the paper finds reverse KL best at what is preferred, forward KL best at variety, others between.
        alpha: of the alpha divergence, between 0 (reverse KL) and 1 (forward KL).
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "f_dpo")
    if not 0.0 < alpha < 1.0:
        raise LuthierError(f"alpha is {alpha}", where="f_dpo: alpha", fix="use more than 0 and less than 1")
    slope = SLOPES[divergence]

    def loss(pairs: Pairs) -> Tensor:
        return -logsigmoid(beta * (slope(pairs.chosen.gained_P, alpha) - slope(pairs.rejected.gained_P, alpha)))

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight)
