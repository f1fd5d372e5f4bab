"""A toy row map: every row twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from luthier.kinds import RowMap, Services
from luthier.registry import method
from luthier.rows.shapes import Row


@method(title="Twice")
def twice(*, suffix: str = " again") -> RowMap:
    """Give every row a second time, under a name of its own.

    Args:
        suffix: what the second row's id ends in.
    """

    def more(rows: Sequence[Row], services: Services) -> list[Row]:
        return [*rows, *(replace(row, id=row.id + suffix) for row in rows)]

    return RowMap(more)
