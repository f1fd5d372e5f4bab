"""The z-loss of PaLM (Chowdhery et al., 2022, section 5): logits are kept near log-probabilities."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import Column, TokenLoss, View
from luthier.registry import method

LOG_PARTITION = Column("log_partition", lambda chunk: chunk.logits_CV.logsumexp(1))
"""log Z, the logarithm of the softmax's denominator."""


@method(title="z-loss", paper="arXiv:2204.02311", reduces_to="weight 0: no penalty")
def z_loss(*, weight: float = 1e-4) -> TokenLoss:
    """Add `weight * log(Z)^2` at each label, Z being the softmax's denominator, beside cross-entropy unless another is named.

    It moves what the loss does not see, the common level of a position's logits, and so is a control for other penalties. Token
    weights multiply it as they do any loss of tokens; the log has the mean of log Z.

    Args:
        weight: multiplies the term; 1e-4 in the paper.
    """

    def loss(view: View) -> Tensor:
        view.note("log Z", view[LOG_PARTITION.name])
        return view[LOG_PARTITION.name].square()

    return TokenLoss(loss, (LOG_PARTITION,), weight, penalty=True)
