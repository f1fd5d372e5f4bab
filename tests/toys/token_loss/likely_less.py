"""A toy token loss: tokens that are likely already count less (Lin et al., 2017, equation 4)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import TokenLoss, View
from luthier.registry import method


@method(title="Likely less", reduces_to="gamma 0: cross-entropy")
def likely_less(*, gamma: float = 2.0) -> TokenLoss:
    """Multiply each token's loss with a power of the probability that is missing to 1.

    Args:
        gamma: the power.
    """

    def loss(view: View) -> Tensor:
        return view["nll"] * (-(-view["nll"]).expm1()).clamp(min=1e-12) ** gamma

    return TokenLoss(loss)
