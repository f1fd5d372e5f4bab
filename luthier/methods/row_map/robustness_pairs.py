"""PA-RAG (Wu et al., 2025), response robustness: pairs whose rejected answer was misled by passages."""

from __future__ import annotations

from luthier.kinds import RowMap
from luthier.methods.row_map._citations import moved_marks
from luthier.methods.row_map._pairs import pair_of
from luthier.methods.row_map._retrieved import coverage, pairs_from_prompts, texts_of
from luthier.registry import method
from luthier.rows.shapes import Row

READ = ("answers", "clean_answers", "passages", "clean_passages", "short_answers")


@method(
    title="PA-RAG, robustness",
    paper="arXiv:2412.14510",
    row=157,
    departs="one pair a prompt, of the first answers of either sort; answers are sampled beforehand; citations of the chosen answer are "
    "renumbered to the noisy prompt's passages, and those of passages that it lacks are left out",
)
def robustness_pairs() -> RowMap:
    """Make pairs behind a prompt with noisy passages: the chosen answer is a complete one written from good passages, the rejected one
    was written behind the noisy prompt and misses something.

    Rows are `prompt` (with the noisy passages), `passages` (these), `answers` (written behind this prompt), `clean_passages` and
    `clean_answers` (the good passages, and answers written from them) and `short_answers` (as for `informativeness_pairs`). Citations
    such as `[2]` count passages from 1. Prompts without both answers make no pair, and are counted.

    Raises:
        LuthierError: a row lacks one of its keys, or no row makes a pair.
    """

    def made(row: Row) -> list[Row]:
        good = [answer for answer in texts_of(row, "clean_answers") if coverage(answer, row) == 1.0]
        misled = [answer for answer in texts_of(row, "answers") if coverage(answer, row) < 1.0]
        passages, clean = texts_of(row, "passages"), texts_of(row, "clean_passages")
        if not good or not misled:
            return []
        return [pair_of(row, "robustness", moved_marks(good[0], clean, passages), misled[0], read=READ)]

    return pairs_from_prompts(made)
