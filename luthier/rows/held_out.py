"""Rows that are held out of training: a share of them, or a number, by what they say.

Each row draws a number from the run's seed and its text, and those below a border are held out. So more rows or another order move no row
to the other side of a share, and rows that say the same go to the same side, in whatever source they stand. A column can take the place of
the text: rows with an equal value then stay together. Of a number of rows the border is that of the lowest draws; more rows can push a few
of those that were held out back.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from luthier.draws import seed_of
from luthier.errors import LuthierError, nearest
from luthier.rows.blocks import BLOCK
from luthier.rows.ids import canonical
from luthier.rows.shapes import Row
from luthier.rows.texts import text_of

DRAWS = 1 << 63
"""Numbers that are drawn from, beginning at 0."""
DOCUMENT = "document"
"""The column of a block that says which document it is of, where the rows have none of this name."""
KEY, BY = "rows.validate", "rows.validate_by"


@dataclass(frozen=True)
class Split:
    """Which rows are held out.

    Args:
        seed: the run's.
        by: the column whose equal values stay together; None: the text.
        below: the draws of the rows that are held out lie below.
    """

    seed: int
    by: str | None
    below: int

    def takes(self, row: Row) -> bool:
        """Whether a row is held out."""
        return draw_of(row, self.seed, self.by) < self.below


def draw_of(row: Row, seed: int, by: str | None = None) -> int:
    """A row's number from 0 to below `DRAWS`, equal for rows that stay together.

    Raises:
        LuthierError: the row has no such column.
    """
    return seed_of(seed, "held out", text_of(row) if by is None else _value(row, by))


def held_out(
    sources: Sequence[Iterable[Row]], amount: float | int, seed: int, by: str | None = None
) -> tuple[Split, list[list[Row]]]:
    """Draw the rows that are held out, in one pass, with no others in memory.

    Args:
        sources: the rows, source by source.
        amount: a share, above 0 and below 1, of which at least one group is held out and one stays; or a number of rows, which becomes
            larger where rows stay together.
        seed: the run's.
        by: as for `Split`.

    Returns:
        What is held out of any rows, and of these, source by source in their order.

    Raises:
        LuthierError: there are too few rows, all of them stay together, or one lacks the column.
    """
    drawn = (
        _Drawn(draw_of(row, seed, by), place, number, row)
        for place, (number, row) in enumerate((number, row) for number, source in enumerate(sources) for row in source)
    )
    found, total, highest = _of_share(drawn, amount) if isinstance(amount, float) else _of_number(drawn, amount)
    if isinstance(amount, float) and len(found) > 1:
        # All that there is would be held out: what drew highest stays.
        found.pop(highest, None)
    if not found or highest in found:
        raise _too_few(amount, total, groups=len(found), by=by)
    rows = sorted((one for some in found.values() for one in some), key=lambda one: one.place)
    split = Split(seed, by, 1 + max(found))
    return split, [[one.row for one in rows if one.source == number] for number in range(len(sources))]


class _Drawn(NamedTuple):
    draw: int
    place: int
    source: int
    row: Row


def _of_share(drawn: Iterable[_Drawn], share: float) -> tuple[dict[int, list[_Drawn]], int, int]:
    """By draw those below the share, or else those of the lowest draw; how many rows there are, and the highest draw."""
    border, lowest, highest, total = round(share * DRAWS), DRAWS, -1, 0
    kept: dict[int, list[_Drawn]] = {}
    for one in drawn:
        total, highest = total + 1, max(highest, one.draw)
        if one.draw < lowest:
            if lowest >= border:
                kept.pop(lowest, None)
            lowest = one.draw
        if one.draw < border or one.draw == lowest:
            kept.setdefault(one.draw, []).append(one)
    return kept, total, highest


def _of_number(drawn: Iterable[_Drawn], wanted: int) -> tuple[dict[int, list[_Drawn]], int, int]:
    """By draw the lowest that are as many rows together; how many rows there are, and the highest draw."""
    highest, total, held = -1, 0, 0
    kept: dict[int, list[_Drawn]] = {}
    draws: list[int] = []
    for one in drawn:
        total, highest = total + 1, max(highest, one.draw)
        if one.draw not in kept:
            if held >= wanted and one.draw > -draws[0]:
                continue
            heapq.heappush(draws, -one.draw)
        kept.setdefault(one.draw, []).append(one)
        held += 1
        while held - len(kept[-draws[0]]) >= wanted:
            held -= len(kept.pop(-heapq.heappop(draws)))
    return kept, total, highest


def _too_few(amount: float | int, total: int, groups: int, by: str | None) -> LuthierError:
    same = f"the same `{by}`" if by is not None else "the same text"
    if total and groups <= 1:
        what = f"none of {total} rows can be held out and another stay, since all have {same}" if total > 1 else "there is one row"
        fix = "name another column, or leave it out" if by is not None and total > 1 else "give more rows"
        return LuthierError(
            what, where=BY if by is not None and total > 1 else KEY, fix=f"{fix}, or rows of their own: {KEY}: FILE"
        )
    together = f", with those of {same} together" if by is not None else ""
    return LuthierError(
        f"{amount} of {total} rows{together} leave none to train on", where=KEY, fix="hold out fewer, or a share such as 0.1"
    )


def _value(row: Row, column: str) -> str:
    """What a row has under a column, as text: a number in one source may be text in another."""
    for found in (row.columns, row.fields):
        if column in found:
            value = found[column]
            return str(value).removesuffix(".0") if isinstance(value, str | int | float) else canonical(value)
    if BLOCK in row.fields and column == DOCUMENT:
        return str(row.fields[BLOCK].document)
    names = [*row.columns, *row.fields]
    raise LuthierError(
        f"the row has no column `{column}`; it has {', '.join(f'`{name}`' for name in names)}",
        where=f"{row.where} ({BY})",
        fix=nearest(column, names) or "give it to every row",
    )
