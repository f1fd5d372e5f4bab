"""A toy token weight: each token counts as much as the model believes in it (Wu et al., 2025, equation 9)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import TokenWeight, View
from luthier.registry import method


@method(title="Probability weight", reduces_to="power 0: every token counts 1")
def probability(*, power: float = 1.0) -> TokenWeight:
    """Weigh each target by a power of its probability.

    Args:
        power: the power.
    """

    def weigh(view: View) -> Tensor:
        return (-power * view["nll"]).exp()

    return TokenWeight(weigh, ("nll",))
