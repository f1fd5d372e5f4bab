"""KL divergence to the model before training, at each target: the anchor of Anchored SFT (Zhu et al., 2025) and of many others."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from luthier.kinds import Batch, LossTerm, Tensors, View
from luthier.registry import method

COLUMNS = {"forward": "kl_forward", "reverse": "kl"}


@method(title="KL to the base", reduces_to="weight 0: no penalty")
def kl(*, weight: float = 0.05, direction: Literal["forward", "reverse"] = "forward") -> LossTerm:
    """Keep the model's distributions near those of the model before training.

    The divergence is over the whole vocabulary, in nats, a mean over all labels of the rows that are run, whatever token weights there
    are. It costs one forward pass of the base without gradients and without dropout, over what the model reads in the step. It stands
    beside another objective: cross-entropy, unless one is named.

    Args:
        weight: multiplies the term; Anchored SFT's examples have 0.05, its scripts 0.1.
        direction: `forward`, KL(base || model), as Anchored SFT's code has it, or `reverse`, KL(model || base).
    """
    column = COLUMNS[direction]

    def count(batch: Batch) -> float:
        return float(batch.supervised)

    def total(view: View, own: Tensors) -> Tensor:
        return view[column].sum()

    return LossTerm(total, count=count, columns=(column,), weight=weight, penalty=True)
