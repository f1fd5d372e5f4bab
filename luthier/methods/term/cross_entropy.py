"""Cross-entropy of the next token, the objective of supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import Tensors, Term, View
from luthier.registry import method


@method(title="Cross-entropy")
def cross_entropy(*, weight: float = 1.0) -> Term:
    """The negative log-likelihood of each target, a mean over the targets of the whole step.

    Args:
        weight: multiplies the term where there are several.
    """

    def total(view: View, own: Tensors) -> Tensor:
        return (view["nll"] * view.weight_N).sum()

    return Term(total, weight=weight)
