"""The smallest technique: count every target by how sure the model already is of it (Wu et al., 2025, equation 9)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import TokenWeight, View
from luthier.registry import method


@method(title="Count by certainty", reduces_to="floor 1: plain cross-entropy")
def toy_technique(*, floor: float = 0.0) -> TokenWeight:
    """Weigh each target by its probability, so that what the model finds absurd pulls less.

    Args:
        floor: the least weight of a target, from 0 to 1.
    """

    def weigh(view: View) -> Tensor:
        return (-view["nll"]).exp().clamp(min=floor)

    return TokenWeight(weigh, columns=("nll",))
