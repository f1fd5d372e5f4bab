"""Label smoothing (Szegedy et al., 2016, section 7): a little of each target is spread evenly over the vocabulary."""

from __future__ import annotations

from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Column, TokenLoss, View
from luthier.registry import method

UNIFORM = Column("uniform_nll", lambda chunk: -chunk.log_probabilities.mean(1))
"""Cross-entropy of a target that is every token alike."""


@method(title="Label smoothing", paper="arXiv:1512.00567", reduces_to="amount 0: cross-entropy")
def label_smoothing(*, amount: float = 0.1) -> TokenLoss:
    """Cross-entropy with a target that gives `1 - amount` to the label, and `amount` evenly to the whole vocabulary, the label too.

    It holds back overconfidence whatever the data, and so is a control for losses that do so in a smarter way.

    Args:
        amount: the share that is spread; 0.1 in the paper.

    Raises:
        LuthierError: `amount` is not in [0, 1).
    """
    if not 0.0 <= amount < 1.0:
        raise LuthierError(f"`amount` is {amount}", where="label_smoothing: amount", fix="use 0 or more, and less than 1")

    def loss(view: View) -> Tensor:
        return (1.0 - amount) * view["nll"] + amount * view[UNIFORM.name]

    return TokenLoss(loss, ("nll", UNIFORM))
