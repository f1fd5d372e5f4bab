"""ERank (Cai et al., 2025), supervised stage: of a teacher's answers the one whose score is nearest to their mean is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from luthier.errors import LuthierError
from luthier.kinds import RowMap, Services
from luthier.registry import method
from luthier.rows.groups import RANKED
from luthier.rows.shapes import Row


@method(
    title="ERank, consensus of scores",
    paper="arXiv:2509.00520",
    row=144,
    reduces_to="one answer a row: that answer",
    departs="the supervised stage; rows bring the teacher's answers and the scores read from them, and what is too long is left out by "
    "rows.max_length, of the answer that was kept; of answers equally near the first in the row is kept",
)
def score_consensus(*, column: str = "") -> RowMap:
    """Learn from several answers that a teacher sampled, each a line of thought that ends in a score: the one whose score is nearest to
    the mean of all is kept, and the others are left out.

    Rows are `prompt`, such as a query and a document, `answers` and their `scores`; the paper samples three of each, and ten are better.
    Answers without a score must not be among them. Other rows stay as they are.

    Args:
        column: the key under which a row holds the mean score; empty: none.

    Raises:
        LuthierError: a row has that key already.
    """

    def map(rows: Sequence[Row], services: Services) -> list[Row]:
        return [kept(row) if row.shape == RANKED else row for row in rows]

    def kept(row: Row) -> Row:
        if column and column in {**row.columns, **row.fields}:
            raise LuthierError(
                f"the row has a key `{column}` already", where=row.where, fix="name another key (score_consensus: column)"
            )
        scores, mean = row.fields["scores"], fmean(row.fields["scores"])
        place = min(range(len(scores)), key=lambda one: abs(scores[one] - mean))
        rest = {key: value for key, value in row.fields.items() if key not in ("answers", "scores")}
        return replace(
            row,
            shape="prompt+completion",
            fields={**rest, "completion": row.fields["answers"][place]},
            columns={**row.columns, **({column: mean} if column else {})},
        )

    def told(before: Sequence[Row], after: Sequence[Row]) -> str:
        ranked = [row.fields["scores"] for row in before if row.shape == RANKED]
        apart = sum(len(set(scores)) > 1 for scores in ranked)
        answers = sum(len(scores) for scores in ranked)
        return f"of {answers} answers one is kept for each of {len(ranked)} prompts, of which {apart} have scores that differ"

    return RowMap(map, told)
