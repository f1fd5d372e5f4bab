"""PA-RAG (Wu et al., 2025), citation quality: pairs that differ in their citations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import LuthierError
from luthier.kinds import RowMap
from luthier.methods.row_map._citations import Entails, precision, recall, rewritten, statements_of
from luthier.methods.row_map._pairs import pair_of
from luthier.methods.row_map._retrieved import pairs_from_prompts, texts_of
from luthier.registry import method
from luthier.rows.answers import words_of
from luthier.rows.shapes import Row

COMMON = frozenset(
    {
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "in",
        "is",
    }
    | {"it", "its", "of", "on", "or", "she", "that", "the", "their", "they", "this", "to", "was", "were", "which", "with"}
)
"""Words of English that say little of what a sentence is about."""


@method(
    title="PA-RAG, citation quality",
    paper="arXiv:2412.14510",
    row=157,
    departs="rows bring the verdicts of a model of entailment, or words are compared; an answer with a statement that no passages entail "
    "makes no pair, so that both answers have the same words; marks of passages that do not exist count against precision, which the "
    "authors' scorer leaves out; of several ways to cite the fewest and first passages are taken",
)
def citation_pairs(*, share: float = 1.0) -> RowMap:
    """Make pairs of an answer with wrong, missing or redundant citations, and the same answer with right ones.

    Rows are `prompt`, `passages` (counted from 1) and `answers` with citations such as `[2]` behind their sentences. A citation is right
    where the passages entail the sentence. Where a row has `entailed`, that says so: for each sentence without its citations the smallest
    sets of passages that entail it, such as `{"Oslo is a city.": [[1], [2, 3]]}`, as a model of entailment found. Otherwise passages entail
    a sentence that has its words from them. Answers that are right, or cannot be made so, make no pair.

    Args:
        share: of a sentence's words, common ones left out, that must stand in the passages, where a row has no `entailed`.

    Raises:
        LuthierError: the share is not above 0 and at most 1, a row lacks one of its keys or says nothing of a sentence, or no row makes a
            pair.
    """
    if not 0.0 < share <= 1.0:
        raise LuthierError(f"the share is {share}", where="citation_pairs: share", fix="use more than 0 and at most 1")

    def made(row: Row) -> list[Row]:
        passages = texts_of(row, "passages")
        entails = _as_told(row) if "entailed" in row.fields else _by_words(passages, share)
        pairs = []
        for place, answer in enumerate(texts_of(row, "answers")):
            before = statements_of(answer)
            after = [rewritten(one, entails, len(passages)) for one in before]
            right = [
                recall(some, entails, len(passages)) == precision(some, entails, len(passages)) == 1.0 for some in (before, after)
            ]
            if right == [False, True]:
                chosen = "".join(one.text for one in after)
                pairs.append(pair_of(row, f"citations{place}", chosen, answer, read=("answers", "passages", "entailed")))
        return pairs

    return pairs_from_prompts(made)


def _by_words(passages: Sequence[str], share: float) -> Entails:
    held = [frozenset(words_of(one)) for one in passages]

    def entails(statement: str, numbers: Sequence[int]) -> bool:
        said = set(words_of(statement)) - COMMON
        found = frozenset[str]().union(*(held[number - 1] for number in numbers))
        return bool(said) and len(said & found) / len(said) >= share

    return entails


def _as_told(row: Row) -> Entails:
    told: Any = row.fields["entailed"]

    def entails(statement: str, numbers: Sequence[int]) -> bool:
        sets = told.get(statement) if isinstance(told, Mapping) else None
        if not isinstance(sets, list | tuple) or not all(isinstance(one, list | tuple) and one for one in sets):
            raise LuthierError(
                f"the row's `entailed` does not say which passages entail `{statement}`",
                where=row.where,
                fix="give a list of sets of passages for each sentence of its answers, empty where none do",
            )
        return any(set(one) <= set(numbers) for one in sets)

    return entails
