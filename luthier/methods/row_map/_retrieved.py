"""Rows of a prompt with retrieved passages and several answers to it, as PA-RAG (Wu et al., 2025) makes pairs of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from luthier.errors import LuthierError
from luthier.kinds import RowMap, Services
from luthier.rows.answers import contains
from luthier.rows.shapes import Row


def texts_of(row: Row, key: str) -> list[str]:
    """A list of texts that a row holds beside its prompt.

    Raises:
        LuthierError: it is missing, empty, or holds something else.
    """
    found = row.fields.get(key)
    if not isinstance(found, list | tuple) or not found or not all(isinstance(one, str) and one.strip() for one in found):
        raise LuthierError(
            f"the row's `{key}` is no list of texts", where=row.where, fix=f"give `{key}`, a list of one text or more"
        )
    return list(found)


def coverage(answer: str, row: Row) -> float:
    """The share of the row's `short_answers` that stand in an answer: each is a text, or a list of spellings of which one is enough.

    Raises:
        LuthierError: the row has none.
    """
    wanted: Any = row.fields.get("short_answers")
    wanted = [[one] if isinstance(one, str) else one for one in wanted] if isinstance(wanted, list | tuple) else []
    if not wanted or not all(one and all(isinstance(text, str) and text.strip() for text in one) for one in wanted):
        raise LuthierError(
            "the row's `short_answers` is no list of texts, or of lists of spellings",
            where=row.where,
            fix="give `short_answers`, all that a complete answer has to name",
        )
    return fmean(contains(answer, one) for one in wanted)


def pairs_from_prompts(made: Callable[[Row], list[Row]]) -> RowMap:
    """A row map that makes pairs of rows whose own shape is a prompt alone, and leaves others as they are.

    Args:
        made: the pairs of one row.
    """

    def map(rows: Sequence[Row], services: Services) -> list[Row]:
        found = [one for row in rows for one in (made(row) if row.shape == "prompt" else [row])]
        if rows and not found:
            raise LuthierError("no row makes a pair", where=rows[0].where, fix="sample more answers to each prompt")
        return found

    def told(before: Sequence[Row], after: Sequence[Row]) -> str:
        asked = [row.id for row in before if row.shape == "prompt"]
        used = {row.id.rpartition("#")[0] for row in after}
        found = len(after) - (len(before) - len(asked))
        return f"{found} pairs of {len(asked)} prompts; {sum(id not in used for id in asked)} prompts make none"

    return RowMap(map, told)
