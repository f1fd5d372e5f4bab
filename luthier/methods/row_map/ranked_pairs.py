"""Pairs of ranked answers, as reward models are taught from rankings (Ouyang et al., 2022), section 3.5."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Literal

from luthier.errors import LuthierError
from luthier.kinds import RowMap, Services
from luthier.methods.row_map._pairs import pair_of
from luthier.registry import method
from luthier.rows.groups import RANKED
from luthier.rows.shapes import Row

Places = tuple[int, int]
"""Of the better answer and of the worse one."""
COMPARED: Mapping[str, Callable[[Sequence[int]], Iterable[Places]]] = {
    "all": lambda order: combinations(order, 2),
    "best": lambda order: ((order[0], other) for other in order[1:]),
    "adjacent": pairwise,
}
"""Which two answers are compared, by their places from the best to the worst."""


@method(
    title="Pairs of ranked answers",
    paper="arXiv:2203.02155",
    reduces_to="two answers with different scores: the one pair of them",
    departs="each pair is a row of its own, where the paper keeps all pairs of a prompt in one batch element",
)
def ranked_pairs(*, pairs: Literal["all", "best", "adjacent"] = "all", margin: str = "") -> RowMap:
    """Make pairs of rows with `prompt`, `answers` and `scores`: of two answers the one with the higher score is chosen.

    Answers with the same score make no pair; they are counted. Other rows stay as they are. A row `ID` becomes `ID#0>2` and so on, after
    the places of its answers.

    Args:
        pairs: `all`: of each two answers, as in the paper; `best`: of the best one and each of the others; `adjacent`: of each and the
            next one below it. Of answers with the same score the first in the row stands first.
        margin: the key under which a pair holds by how much its scores differ, for objectives such as `margin`; empty: none.

    Raises:
        LuthierError: a row has that key already, or no two answers differ in their scores.
    """

    def compared(row: Row) -> list[Places]:
        scores = row.fields["scores"]
        return list(COMPARED[pairs](sorted(range(len(scores)), key=lambda place: -scores[place])))

    def made(row: Row) -> list[Row]:
        if margin and margin in {**row.columns, **row.fields}:
            raise LuthierError(
                f"the row has a key `{margin}` already", where=row.where, fix="name another key (ranked_pairs: margin)"
            )
        answers, scores = row.fields["answers"], row.fields["scores"]
        by = {(first, second): scores[first] - scores[second] for first, second in compared(row)}
        return [
            pair_of(
                row,
                f"{first}>{second}",
                answers[first],
                answers[second],
                read=("answers", "scores"),
                columns={margin: difference} if margin else None,
            )
            for (first, second), difference in by.items()
            if difference > 0
        ]

    def map(rows: Sequence[Row], services: Services) -> list[Row]:
        found = [one for row in rows for one in (made(row) if row.shape == RANKED else [row])]
        if rows and not found:
            raise LuthierError(
                "no two answers to one prompt differ in their scores",
                where=rows[0].where,
                fix="give other scores, or more answers",
            )
        return found

    def told(before: Sequence[Row], after: Sequence[Row]) -> str:
        ranked = [row for row in before if row.shape == RANKED]
        found = len(after) - (len(before) - len(ranked))
        ties = sum(len(compared(row)) for row in ranked) - found
        return f"{found} pairs of {len(ranked)} ranked rows; {ties} more have equal scores and make none"

    return RowMap(map, told)
