"""A toy row score: long rows first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from luthier.kinds import RowScore, RowServices
from luthier.registry import method
from luthier.rows.shapes import Row
from luthier.rows.texts import text_of


@method(title="Longest rows")
def longest(*, unit: Literal["characters", "words"] = "characters") -> RowScore:
    """Choose the longest rows.

    Args:
        unit: what counts.
    """

    def score(rows: Sequence[Row], services: RowServices) -> list[float]:
        return [float(len(text_of(row) if unit == "characters" else text_of(row).split())) for row in rows]

    return RowScore(score)
