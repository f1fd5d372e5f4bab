"""Supervised fine-tuning on the better of two answers."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.kinds import RowMap, Services
from luthier.registry import method
from luthier.rows.groups import PAIR, sides
from luthier.rows.shapes import Row


@method(title="Chosen answers alone", reduces_to="rows without a rejected answer: the same rows")
def chosen_answers() -> RowMap:
    """Learn the chosen answer of each pair as a completion, and leave the rejected one out: what a loss over pairs is compared with."""

    def map(rows: Sequence[Row], services: Services) -> list[Row]:
        return [_chosen(row) if row.shape == PAIR else row for row in rows]

    return RowMap(map)


def _chosen(row: Row) -> Row:
    first = sides(row)[0]
    return Row(row.id, first.shape, first.fields, row.where, row.columns, row.derived)
