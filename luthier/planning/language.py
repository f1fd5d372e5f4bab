"""Whether a toy model knows the language of the rows: it was taught a small world of words, and no English."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.models.packaged import BUILT, PACKAGED
from luthier.rows.shapes import Row

LOOKED_AT = 200
"""So many rows are looked at, from the first on."""
UNKNOWN = 0.5
"""The share of words in pieces from which on the language is unknown: of rows of the toy models' own world hardly any are, of English two
thirds."""
_WORD = re.compile(r"(?<=[a-z,] )[a-z]{4,}\b")


def unknown_language(name: str, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]) -> list[str]:
    """A warning where a toy model gets rows in a language that it does not know: most of their words are no tokens of it.

    Args:
        name: of the model that was there first.
        tokenizer: its tokenizer, which has the words of its world whole.
        rows: what it is to learn from.
    """
    if name not in (*PACKAGED, *BUILT):
        return []
    words = {word for row in islice(rows, LOOKED_AT) for text in _texts(row.fields) for word in _WORD.findall(text)}
    split = sum(len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) > 1 for word in words)
    if not words or split < UNKNOWN * len(words):
        return []
    return [
        f"`{name}` is a toy model that knows the synthetic benchmark and no English: {split / len(words):.0%} of the rows' words are no "
        "words of its vocabulary, and it will learn their letters by heart at best; use a model such as smollm2-135m-instruct"
    ]


def _texts(value: Any) -> Iterator[str]:
    """Every text in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
