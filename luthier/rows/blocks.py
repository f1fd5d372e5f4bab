"""Long documents in blocks: each of at most so many tokens, cut where a paragraph ends, else a sentence, else a token.

The document is tokenized once, as it would be in one piece, with the token that ends it; its blocks are runs of these tokens, one behind
the other, so each token stands in one block and is learned once. Only the last block ends with the token that ends the document: what is
cut has not ended. A tokenizer's own first token stands before each block, as before every text that a model reads.

With an overlap a block begins with the last tokens of the one before: they are read, and no labels a second time.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, TypeVar, get_args

from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.recipe import BlocksRecipe
from luthier.rows.ids import digest, numbered, parted
from luthier.rows.limits import check_choice
from luthier.rows.shapes import Row

At = Literal["paragraph", "sentence", "token"]
T = TypeVar("T")
KEY = "rows.blocks"
BLOCK = "block"
"""The field of a row that holds its `Block`."""
_SPACE = re.compile(r"\s+")
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028]")
_PAGE = frozenset("\x0c\u2029")
_UNSPACED_ENDS = "\u3002\uff01\uff1f\uff61"
"""The full stop, exclamation mark and question mark of scripts that set no space behind a sentence."""
_ENDS = frozenset(".!?\u2026" + _UNSPACED_ENDS)
_CLOSING = "\"'\u201d\u2019\xbb)]"
_UNSPACED = re.compile(f"[{_UNSPACED_ENDS}][{_UNSPACED_ENDS}\u201d\u2019\u300d\u300f\uff09]*")
_LONGEST_END = 5
"""Characters of what ends a sentence: its mark and what closes behind it."""


@dataclass(frozen=True)
class Block:
    """A part of a document, as tokens.

    Args:
        document: names the document's text, so that the same one has the same name wherever it stands.
        number: which of its blocks it is, from 1.
        context: how many of the tokens, from the first, stand in the block before and are only read.
        token_ids: its tokens, without those that stand before every text.
    """

    document: str
    number: int
    context: int
    token_ids: array[int]

    def encoded(self, first_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
        """The ids with those that stand before every text, and which of them are labels."""
        ids = self.token_ids.tolist()
        before = list(first_ids) if ids[:1] != list(first_ids) else []
        return before + ids, [False] * (len(before) + self.context) + [True] * (len(ids) - self.context)


@dataclass(frozen=True)
class Splitter:
    """Cuts documents into blocks.

    Args:
        tokenizer: the model's; it must tell where in a text its tokens stand.
        first_ids: the ids that stand before every text.
        tokens: the most tokens of a block, with all that is added.
        overlap: how many of them are the last of the block before, at most.
        at: the largest part of a text that stays whole where it can.

    Raises:
        LuthierError: the tokenizer tells no places, or an overlap leaves no room for anything new.
    """

    tokenizer: PreTrainedTokenizerBase
    first_ids: tuple[int, ...]
    tokens: int
    overlap: int = 0
    at: At = "paragraph"

    def __post_init__(self) -> None:
        check_choice("at", self.at, get_args(At))
        if not self.tokenizer.is_fast:
            raise LuthierError(
                "this tokenizer does not tell where in a text its tokens stand",
                where=KEY,
                fix="cut the documents beforehand, or use a model with a fast tokenizer (tokenizer.json)",
            )
        if self._room(self.overlap) < 2:
            raise LuthierError(
                f"of blocks of {self.tokens} tokens an overlap of {self.overlap} leaves room for {max(0, self._room(self.overlap))}",
                where=f"{KEY}.overlap",
                fix="lower the overlap, or allow more tokens",
            )

    def rows(self, rows: Iterable[T]) -> Iterator[T | Row]:
        """Rows, the documents among them in blocks; whatever is none stays."""
        for one in rows:
            if isinstance(one, Row) and one.shape == "text" and BLOCK not in one.fields:
                yield from self.blocks(one)
            else:
                yield one

    def blocks(self, row: Row) -> list[Row]:
        """The blocks of one document, as rows: their texts one behind the other are the document, and so are their tokens."""
        text, eos = row.fields["text"], str(self.tokenizer.eos_token or "")
        whole = text if eos and text.endswith(eos) else text + eos
        given = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = given["input_ids"], given["offset_mapping"]
        # Some tokenizers tell of no spaces: those between two tokens belong to the second one.
        begins = [0, *accumulate((end for _, end in offsets[:-1]), max)]
        # The token that ends a document is no block by itself, and a character that is several tokens stays whole.
        free = [place for place in range(1, len(ids) - bool(eos)) if offsets[place][0] >= begins[place]]
        levels, cuts = _levels(text, begins, free, self.at), [0]
        while len(ids) - cuts[-1] > (room := self._room(self._context(free, cuts[-1]))):
            cuts.append(_cut(levels, cuts[-1], cuts[-1] + room))
        document, found = f"{digest(text) % 2**64:016x}", []
        for number, (start, end) in enumerate(pairwise([*cuts, len(ids)]), start=1):
            context = self._context(free, start)
            block = Block(document, number, context, array("i", ids[start - context : end]))
            piece = text[begins[start] : begins[end] if end < len(ids) else len(text)]
            found.append(
                replace(row, id=_id(row, number), where=f"{row.where}#{number}", fields={**row.fields, "text": piece, BLOCK: block})
            )
        return found

    def told(self, rows: Iterable[Row] | None = None) -> str:
        """How documents were cut, in words; of rows also how many."""
        blocks = [row.fields[BLOCK] for row in rows or () if BLOCK in row.fields]
        documents = sum(block.number == 1 for block in blocks)
        counted = f"{documents:,} document{'' if documents == 1 else 's'} in {len(blocks):,} "
        overlap = f", of which up to {self.overlap:,} stand in the block before and are only read" if self.overlap else ""
        border = "tokens" if self.at == "token" else f"{self.at}s where that is possible"
        return f"{'' if rows is None else counted}blocks of at most {self.tokens:,} tokens{overlap}; cut between {border}"

    def _room(self, context: int) -> int:
        return self.tokens - len(self.first_ids) - context

    def _context(self, free: Sequence[int], start: int) -> int:
        """How many tokens before a block's own it begins with."""
        if start <= self.overlap:
            return start
        place = bisect_left(free, start - self.overlap)
        return max(0, start - free[place]) if place < len(free) else 0


def splitter_of(
    recipe: BlocksRecipe | None, tokenizer: PreTrainedTokenizerBase, first_ids: tuple[int, ...], longest: int | None
) -> Splitter | None:
    """What a recipe cuts documents with; None where it leaves them whole.

    Args:
        recipe: what it says of blocks.
        tokenizer, first_ids: as for `Splitter`.
        longest: the most tokens of a row; None where nothing says.

    Raises:
        LuthierError: nothing says how long a block may be, it may be longer than a row, or as `Splitter`.
    """
    if recipe is None:
        return None
    tokens = recipe.tokens
    if tokens is None and longest is None:
        raise LuthierError(
            "the model does not say how much it reads at once",
            where=f"{KEY}.tokens",
            fix="say how many tokens a block has at most",
        )
    if tokens is not None and longest is not None and tokens > longest:
        raise LuthierError(
            f"blocks of {tokens} tokens are longer than a row may be ({longest})",
            where=f"{KEY}.tokens",
            fix=f"use at most {longest}",
        )
    return Splitter(tokenizer, first_ids, tokens or longest or 0, recipe.overlap, recipe.at)


def _id(row: Row, number: int) -> str:
    """Of an id that tells equal contents apart the number stays the last: that of a content's block comes before."""
    content, occurrence = parted(row.id) if row.derived else (row.id, 1)
    return numbered(f"{content}#{number}", occurrence)


def _levels(text: str, begins: Sequence[int], free: Sequence[int], at: At) -> list[Sequence[int]]:
    """Tokens that a block may begin with: first those at the largest borders."""
    if at == "token":
        return [free]
    open_places = frozenset(free)

    def first_tokens(gaps: Iterable[tuple[int, int]]) -> list[int]:
        found = set()
        for low, high in gaps:
            place = bisect_right(begins, high) - 1
            while place > 0 and begins[place] >= low and place not in open_places:
                place -= 1
            if place > 0 and begins[place] >= low:
                found.add(place)
        return sorted(found)

    paragraphs = first_tokens(_paragraphs(text))
    sentences = sorted({*paragraphs, *first_tokens(_sentences(text))})
    return [paragraphs, sentences, free] if at == "paragraph" else [sentences, free]


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Where one paragraph has ended and the next begins: at a blank line, or a new page."""
    for gap in _SPACE.finditer(text):
        if len(_LINE_BREAK.findall(gap[0])) > 1 or _PAGE & {*gap[0]}:
            yield gap.span()


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where one sentence has ended and the next begins."""
    for gap in _SPACE.finditer(text):
        before = text[max(0, gap.start() - _LONGEST_END) : gap.start()].rstrip(_CLOSING)
        if before[-1:] in _ENDS:
            yield gap.span()
    for end in _UNSPACED.finditer(text):
        yield end.end(), end.end()


def _cut(levels: Sequence[Sequence[int]], start: int, limit: int) -> int:
    """The last border that a block can reach, of the first level that has one."""
    for borders in levels:
        place = bisect_right(borders, limit) - 1
        if place >= 0 and borders[place] > start:
            return borders[place]
    # A single character is longer than a block.
    return limit
