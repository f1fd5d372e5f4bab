"""Re-initialized top layers (Tinn et al., 2021): the last blocks begin anew, as before pre-training, then everything trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.registry import method

DEPTH_SCALED = frozenset({"gpt2", "gpt_bigcode"})
"""Families that divide the deviation of what is added to the residual stream by sqrt(2L)."""
OFFSET_NORMS = frozenset({"gemma", "gemma2", "gemma3_text", "vaultgemma"})
"""Families whose norms multiply by one plus their weight, which therefore begins at 0."""


@method(
    title="Re-initialized top layers",
    paper="arXiv:2112.07869",
    row=20,
    reduces_to="blocks 0: full fine-tuning",
    departs="blocks only; a pooler or head keeps what it has",
    step0="on purpose not the base",
    merges="is in place",
    learning_rate=1e-4,
)
def reinitialized_top(*, blocks: int = 1, deviation: float | None = None) -> Selective:
    """Draw the last blocks anew as before pre-training, then train every number: for labels on few rows.

    Matrices are drawn from a normal distribution, biases are 0 and norms the identity; families that scale residual projections
    with the depth (GPT-2) keep to that. The model loses its command of language with its top blocks: use it to learn a
    classification or regression, never for a model that is to write.

    Args:
        blocks: n, how many of the last blocks begin anew; the paper tries 1 to 6.
        deviation: the standard deviation of new matrices; None: the one in the model's own configuration, mostly 0.02.
    """
    if blocks < 0:
        raise LuthierError(f"{blocks} blocks are to begin anew", where="reinitialized_top: blocks", fix="use 0 or more")
    if deviation is not None and deviation <= 0.0:
        raise LuthierError(f"the deviation is {deviation}", where="reinitialized_top: deviation", fix="use more than 0")

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        if blocks > parts.blocks:
            raise LuthierError(
                f"{blocks} blocks are to begin anew, and the model has {parts.blocks}",
                where="reinitialized_top: blocks",
                fix=f"use 0 to {parts.blocks}",
            )
        spread = _own_deviation(parts) if deviation is None else deviation

        def select(place: Place) -> Select:
            if place.block is None or place.block < parts.blocks - blocks:
                return Select("whole")
            rng = services.rng(f"reinitialized_top {place}")
            return Select("whole", start=fresh(services.weight(place), place, parts, spread, rng))

        return {place: select(place) for place in parts.places}

    return Selective(choose)


def _own_deviation(parts: Parts) -> float:
    if parts.initial_deviation is None:
        raise LuthierError(
            f"the configuration of this {parts.architecture} does not say with which deviation its matrices began",
            where="reinitialized_top: deviation",
            fix="give the deviation, mostly 0.02",
        )
    return parts.initial_deviation


def fresh(values: Tensor, place: Place, parts: Parts, deviation: float, rng: torch.Generator) -> Tensor:
    """New values in the shape and type of old ones, [O, I] or [O]: as the family begins them."""
    if place.tensor.endswith("bias"):
        return torch.zeros_like(values)
    if place.role.endswith("norm"):
        return torch.zeros_like(values) if parts.architecture in OFFSET_NORMS else torch.ones_like(values)
    is_scaled = parts.architecture in DEPTH_SCALED and place.role in ("attention_output", "mlp_down")
    scale = deviation / math.sqrt(2 * parts.blocks) if is_scaled else deviation
    # Drawn in fp32 whatever the model's type, so that the numbers are the same.
    return (scale * torch.randn(values.shape, generator=rng)).to(values)
