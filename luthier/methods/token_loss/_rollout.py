"""What the sampled and the expected form of One-Token Rollout share: the policy that proposes tokens, and the bounds of its options.

Shapes: C positions of one chunk, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier import draws, machine
from luthier.errors import LuthierError
from luthier.kinds import Chunk

STREAM = 1
"""Of the draws, so that they are independent of others that columns make."""


def policy(chunk: Chunk, temperature: float) -> Tensor:
    """Probabilities of the tokens that are proposed, [C, V], without gradient."""
    return (chunk.logits_CV.detach() / temperature).softmax(1)


def candidates_of(chunk: Chunk, temperature: float, count: int) -> Tensor:
    """Token ids drawn from the policy, independent of each other and of how the batch is split: [C, K]."""

    def make() -> Tensor:
        up_to_CV = machine.widened(policy(chunk, temperature)).cumsum_(1)
        level_CK = machine.widened(draws.uniforms(chunk.key_C, count, STREAM)) * up_to_CV[:, -1:]
        found_CK = torch.searchsorted(up_to_CV, level_CK, right=True).clamp_(max=up_to_CV.shape[1] - 1)
        return found_CK.to(chunk.key_C.device)

    return chunk.keep(f"{count} candidates at {temperature}", make)


def check_temperature(name: str, temperature: float) -> None:
    """Refuse a temperature that divides by zero or turns the policy around.

    Raises:
        LuthierError: it is not above 0.
    """
    if temperature <= 0.0:
        raise LuthierError(f"`temperature` is {temperature}", where=f"{name}: temperature", fix="use more than 0, e.g. 1.3")
