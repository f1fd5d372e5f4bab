"""Random rows: the control that every choice of rows must beat at the same number of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from luthier.kinds import RowScore, RowServices
from luthier.registry import method
from luthier.rows.shapes import Row


@method(title="Random rows")
def random_rows() -> RowScore:
    """Choose rows at random, by the seed."""

    def score(rows: Sequence[Row], services: RowServices) -> list[float]:
        score_B = torch.rand(len(rows), generator=services.rng("random rows"), dtype=torch.float64)
        return [float(one) for one in score_B]

    return RowScore(score)
