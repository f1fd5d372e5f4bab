"""PA-RAG (Wu et al., 2025), response informativeness: pairs whose rejected answer misses something."""

from __future__ import annotations

from luthier.kinds import RowMap
from luthier.methods.row_map._pairs import pair_of
from luthier.methods.row_map._retrieved import coverage, pairs_from_prompts, texts_of
from luthier.registry import method
from luthier.rows.shapes import Row


@method(
    title="PA-RAG, informativeness",
    paper="arXiv:2412.14510",
    row=157,
    departs="one pair a prompt, of the first answers of either sort; answers are sampled beforehand; short answers are looked for "
    "as whole words",
)
def informativeness_pairs() -> RowMap:
    """Make pairs of answers to a prompt with retrieved passages: the chosen one names all short answers, the rejected one misses some.

    Rows are `prompt`, `answers` (texts, sampled from the model) and `short_answers` (all that a complete answer names; each a text, or a
    list of its spellings). The first complete answer and the first incomplete one make the pair; prompts without both make none, and are
    counted. Rows of another shape stay as they are. Train on the pairs with `dpo`, from the model that was fine-tuned on good answers.

    Raises:
        LuthierError: a row lacks one of its keys, or no row makes a pair.
    """

    def made(row: Row) -> list[Row]:
        covered = {answer: coverage(answer, row) for answer in texts_of(row, "answers")}
        complete = [answer for answer, share in covered.items() if share == 1.0]
        lacking = [answer for answer, share in covered.items() if share < 1.0]
        read = ("answers", "short_answers")
        return [pair_of(row, "informativeness", complete[0], lacking[0], read=read)] if complete and lacking else []

    return pairs_from_prompts(made)
