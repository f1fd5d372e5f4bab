"""Cross-entropy of the next token, the objective of supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import LossTerm, Tensors, View
from luthier.registry import method


@method(title="Cross-entropy")
def cross_entropy(*, weight: float = 1.0) -> LossTerm:
    """The negative log-likelihood of each target, a mean over the labels of the whole step.

    Args:
        weight: multiplies the term where there are several.
    """

    def total(view: View, own: Tensors) -> Tensor:
        return (view["nll"] * view.weight_N).sum()

    return LossTerm(total, weight=weight)
