"""Freezing the lower layers: Telly-K (Shi et al., 2023), and the stability study of Tinn et al. (2021)."""

from __future__ import annotations

import math
from typing import Literal

from luthier.errors import LuthierError
from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.methods.selective._depth import depth
from luthier.registry import method


@method(
    title="Freezing lower layers",
    paper="arXiv:2304.05216",
    row=219,
    reduces_to="blocks 0 and embeddings train: full fine-tuning",
    departs="a head that shares its matrix with the embedding stays frozen with it; nothing of the frozen layers' outputs is cached",
    merges="is in place",
    learning_rate=2e-4,
)
def freeze_lower(*, blocks: int | None = None, share: float = 0.5, embeddings: Literal["freeze", "train"] = "freeze") -> Selective:
    """Train only the upper blocks and what follows them: what tuning changes most lies there, and lower layers hold general knowledge.

    With K frozen blocks, Telly-K for K = 0 freezes the embeddings alone, and its "base" is full fine-tuning: `blocks` 0 with
    `embeddings` train. The same freezing steadies tuning on few rows (arXiv:2112.07869), whose F frozen layers are `blocks` F. No
    graph is built below the first trained block, so that a step gets cheaper with each frozen one.

    Args:
        blocks: K, how many of the lowest blocks are frozen, from 0 to all of them; None leaves it to `share`.
        share: the share of the blocks that is frozen, rounded down, where `blocks` does not tell; half, as the stability study
            has it for models of up to twelve layers.
        embeddings: whether what stands before the blocks is frozen as well, as in both papers.
    """
    if blocks is not None and blocks < 0:
        raise LuthierError(f"{blocks} blocks are to be frozen", where="freeze_lower: blocks", fix="use 0 or more")
    if not 0.0 <= share <= 1.0:
        raise LuthierError(f"the share is {share}", where="freeze_lower: share", fix="use 0 to 1")

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        count = frozen_blocks(parts.blocks, blocks, share)
        kept = [place for place in parts.places if depth(place, parts) > count]
        before = [place for place in parts.places if depth(place, parts) == 0] if embeddings == "train" else []
        return {place: Select("whole") for place in [*before, *kept]}

    return Selective(choose)


def frozen_blocks(count: int, blocks: int | None, share: float) -> int:
    """How many of a model's blocks are frozen: `blocks`, or the share of them, rounded down.

    Raises:
        LuthierError: more blocks than the model has.
    """
    # A share such as 0.7 of ten blocks must not fall to six by rounding.
    frozen = math.floor(share * count + 1e-9) if blocks is None else blocks
    if frozen > count:
        raise LuthierError(
            f"{frozen} blocks are to be frozen, and the model has {count}",
            where="freeze_lower: blocks",
            fix=f"use 0 to {count}",
        )
    return frozen
