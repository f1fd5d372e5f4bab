"""What a row may be at most: so long, and of tokens that the model knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.kinds.parts import Reads
from luthier.rows.shapes import Row

TooLong = Literal["refuse", "left", "right"]
ANYTHING = Reads()
"""Of a model of which nothing is known."""


@dataclass(frozen=True)
class Limits:
    """How long a row may be.

    Args:
        max_length: as asked for; None for no limit but the model's.
        too_long: what happens to longer rows.
        reads: what the model can read.
    """

    max_length: int | None
    too_long: TooLong
    reads: Reads = ANYTHING

    def __post_init__(self) -> None:
        check_choice("too_long", self.too_long, get_args(TooLong))
        if self.max_length is not None and self.max_length < 2:
            raise LuthierError(f"max_length is {self.max_length}", fix="allow at least 2: one token to see and one to learn")
        if self.reads.context is not None and self.reads.context < 2:
            raise LuthierError(
                f"the model's configuration says that it reads {self.reads.context} tokens at once",
                where="max_position_embeddings",
                fix="copy the model again, or write there what it was trained with, at least 2",
            )

    @property
    def longest(self) -> int | None:
        """The most tokens a row may have; None for no limit."""
        return min((one for one in (self.max_length, self.reads.context) if one is not None), default=None)

    def refusal(self, row: Row, tokens: int) -> LuthierError:
        """What to say of a row that is too long: of the model's own limit, if it is over that."""
        context = self.reads.context
        blocks = ", or split it into blocks with rows.blocks: {}" if row.shape == "text" else ""
        if context is not None and tokens > context:
            what = f"the row has {tokens} tokens, and at most {context} are allowed: this model reads no more"
            fix = "split it into blocks with rows.blocks: {}" if blocks else "shorten or split the row"
            blocks = ""
        else:
            what = f"the row has {tokens} tokens, and at most {self.longest} are allowed"
            fix = "raise max_length" + (f" to at most {context}, which is all this model reads" if context is not None else "")
        return LuthierError(what, where=row.where, fix=f"{fix}, or cut long rows with too_long{blocks}")


def check_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, where: str) -> None:
    """Refuse tokens that a model does not know.

    Args:
        ids: of a row.
        tokenizer: gave them.
        vocabulary: how many ids the model knows, from 0 on; None where that is not known.
        where: the row, for errors.

    Raises:
        LuthierError: an id is beyond them.
    """
    if vocabulary is None or max(ids, default=0) < vocabulary:
        return
    beyond = next(one for one in ids if one >= vocabulary)
    raise LuthierError(
        f"the token `{tokenizer.convert_ids_to_tokens(beyond)}` has the id {beyond}, and this model knows ids up to {vocabulary - 1}",
        where=where,
        fix="use the tokenizer that belongs to the model, or a model whose embedding has been resized and trained for it",
    )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that is none of those known.

    Raises:
        LuthierError: it is not.
    """
    if value not in known:
        raise LuthierError(f"{name} is {value!r}", fix="write one of: " + ", ".join(known))
