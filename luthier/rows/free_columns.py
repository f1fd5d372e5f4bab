"""Free columns that a technique reads of every row."""

from __future__ import annotations

import math

from luthier.errors import LuthierError
from luthier.kinds import Batch


def check_numbers(
    batch: Batch, column: str, fix: str, *, called: str = "number", least: float = -math.inf, most: float = math.inf
) -> None:
    """Refuse rows that lack a number.

    Args:
        batch: the rows.
        column: the number's key.
        fix: how rows are put right.
        called: what the number is.
        least: what it may be at least.
        most: what it may be at most.

    Raises:
        LuthierError: a row has no such number, or one that is not finite or out of range.
    """
    column_B = batch.columns.get(column)
    if column_B is None or not bool((column_B.isfinite() & (column_B >= least) & (column_B <= most)).all()):
        raise LuthierError(f"a row has no {called} `{column}`", where=f"row {batch.row_ids[0]}", fix=fix)
