"""Similarity to the target, the control for whatever replications to choose better than by likeness.

It stands for the methods that match candidates to a target by features, such as DSIR (Xie et al., 2023) and TSDS (Liu et al., 2024),
without their sampling. K target rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from luthier import machine
from luthier.kinds import RowScore, RowServices
from luthier.registry import method
from luthier.rows.shapes import Row
from luthier.rows.texts import text_of

PIECE = 4096


@method(title="Nearest rows", needs=("target", "embed"))
def nearest(*, to: Literal["closest", "all"] = "closest") -> RowScore:
    """Choose the rows that are most like the target, by the cosine of their embeddings.

    Args:
        to: `closest`, a row's similarity to the target row closest to it, or `all`, its mean similarity to all of them.
    """

    def score(rows: Sequence[Row], services: RowServices) -> list[float]:
        embedding_BD = machine.widened(services.embed([text_of(row) for row in rows]))
        target_KD = machine.widened(services.embed([text_of(row) for row in services.target]))
        if to == "all":
            return [float(one) for one in embedding_BD @ target_KD.mean(0)]
        # In pieces, because every row beside every target row can be more than memory holds.
        return [float(one) for piece in embedding_BD.split(PIECE) for one in (piece @ target_KD.T).amax(1)]

    return RowScore(score)
