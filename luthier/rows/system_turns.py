"""How many rows begin with a system turn: a model that learned with one answers worse without, and the reverse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from luthier.rows.shapes import Row

LOOKED_AT = 1000
"""So many rows are looked at, from the first on."""
_SYSTEM = ("system", "developer")


def share_with_system(rows: Iterable[Row]) -> float | None:
    """The share of rows that begin with a system turn, of those that ask something; None where none does, as in plain text."""
    found = []
    for row in islice(rows, LOOKED_AT):
        asked = row.fields.get("messages") or row.fields.get("prompt")
        if asked:
            first = asked[0]
            found.append(isinstance(first, Mapping) and first.get("role") in _SYSTEM)
    return sum(found) / len(found) if found else None
