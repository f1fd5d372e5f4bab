"""A pair of two answers to a row's prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from luthier.rows.groups import PAIR
from luthier.rows.messages import Message
from luthier.rows.shapes import Row

Answer = str | list[Message]


def pair_of(
    row: Row, name: str, chosen: Answer, rejected: Answer, *, read: Collection[str], columns: Mapping[str, float] | None = None
) -> Row:
    """The row `ID#NAME`.

    Args:
        row: with a prompt.
        name: tells it from other pairs of the row.
        chosen: the better answer.
        rejected: the other one.
        read: keys of the row that end here.
        columns: more free numbers of the pair.
    """
    rest = {key: value for key, value in row.fields.items() if key not in read}
    fields = {**rest, "chosen": chosen, "rejected": rejected}
    return replace(row, id=f"{row.id}#{name}", shape=PAIR, fields=fields, columns={**row.columns, **(columns or {})})
