"""Anchored Supervised Fine-Tuning (Zhu et al., 2025), after the authors' code: DFT with a KL divergence to the base."""

from __future__ import annotations

from typing import Literal

from luthier.kinds import LossTerm, TokenWeight
from luthier.methods.loss_term.cross_entropy import cross_entropy
from luthier.methods.loss_term.kl import kl
from luthier.methods.token_weight.dft import dft
from luthier.registry import method


@method(
    title="Anchored SFT",
    paper="arXiv:2509.23753",
    row=99,
    reduces_to="anchor 0: cross-entropy with dft",
    departs="a mean over the labels of the whole step, where the authors' code has each micro-batch's own",
    replication="asft",
)
def asft(*, anchor: float = 0.05, direction: Literal["forward", "reverse"] = "forward") -> tuple[LossTerm, TokenWeight, LossTerm]:
    """Let each label count as much as the model believes in it, and hold the model's distributions near the base's.

    It is `cross_entropy` with the token weight `dft`, beside the term `kl`, which no token weight touches.

    Args:
        anchor: multiplies the divergence; 0.05 in the authors' examples, 0.1 in their scripts.
        direction: `forward`, KL(base || model), as the authors' code has it, or `reverse`, KL(model || base).
    """
    return cross_entropy(), dft(), kl(weight=anchor, direction=direction)
