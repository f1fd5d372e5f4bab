"""Texts whose words have labels: spans of characters or a tag a word, read, checked, and found again among the tokens.

Tags are those of CoNLL: `O`, or `B-` and `I-` before the name of what begins at a word or goes on there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from luthier.errors import LuthierError
from luthier.rows.messages import checked_text, kind_of

OUTSIDE = "O"
TAGS = "tags"
"""The free column of a row that holds the tags of its words, one a line."""
WORD = "word"
"""The column of a row's tokens that says which word begins at each, from 1; 0 elsewhere."""
_WORD = re.compile(r"\w+|[^\w\s]")


def of_tokens(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row `tokens`, `tags`: the words stand with a space between them."""
    tokens, tags = record["tokens"], record["tags"]
    for key, values in (("tokens", tokens), ("tags", tags)):
        if not isinstance(values, list | tuple) or not values:
            raise LuthierError(f"`{key}` must be a list of texts, not {kind_of(values)}")
    if len(tokens) != len(tags):
        raise LuthierError(f"the row has {len(tokens)} tokens and {len(tags)} tags", fix="give one tag for each token")
    texts = [checked_text(one, f"tokens[{number}]") for number, one in enumerate(tokens)]
    text, words = "", []
    for one in texts:
        text += " " if text else ""
        words.append((len(text), len(text) + len(one)))
        text += one
    return {"text": text, "words": words, "tags": [_checked_tag(one, f"tags[{number}]") for number, one in enumerate(tags)]}


def of_spans(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row `text`, `spans`: what is neither space nor letter stands alone, and a span's edge also parts words."""
    text, spans = checked_text(record["text"], "text"), record["spans"]
    if not isinstance(spans, list | tuple):
        raise LuthierError(f"`spans` must be a list of objects, not {kind_of(spans)}")
    found = sorted(_span(one, f"spans[{number}]", len(text)) for number, one in enumerate(spans))
    for (_, stop, first), (start, _, second) in pairwise(found):
        if start < stop:
            raise LuthierError(f"the spans of `{first}` and `{second}` overlap at character {start}", fix="keep one of them")
    edges = {edge for start, stop, _ in found for edge in (start, stop)}
    words = [part for match in _WORD.finditer(text) for part in _parted(*match.span(), edges)]
    tags = [OUTSIDE] * len(words)
    for start, stop, label in found:
        inside = [number for number, (first, behind) in enumerate(words) if start <= first and behind <= stop]
        if not inside:
            raise LuthierError(f"the span of `{label}` from {start} to {stop} holds no word", fix="fix its start and stop")
        for number in inside:
            tags[number] = f"{'B' if number == inside[0] else 'I'}-{label}"
    return {"text": text, "words": words, "tags": tags}


def first_pieces(words: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """Which word begins at each token, from 1; 0 elsewhere, and where a token begins several words that of the first.

    Args:
        words: characters of each word: the first, and the one behind the last; in order.
        offsets: those of each token; empty ones are of no text.
    """
    found = [0.0] * len(offsets)
    token = 0
    for number, (first, behind) in enumerate(words, start=1):
        while token < len(offsets) and offsets[token][1] <= first:
            token += 1
        # A token may begin with the space before its word, or with an earlier word's end.
        if token < len(offsets) and offsets[token][0] < behind and not found[token]:
            found[token] = float(number)
    return tuple(found)


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The name, the first word and the one behind the last of each entity, as conlleval reads tags: one begins at `B-`, and also at an `I-`
    that goes on with nothing of its name."""
    found: list[tuple[str, int, int]] = []
    open_name, start = "", 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, _, name = tag.partition("-")
        name = name if mark in ("B", "I") else ""
        if open_name and (name != open_name or mark == "B"):
            found.append((open_name, start, place))
            open_name = ""
        if name and not open_name:
            open_name, start = name, place
    return found


def _span(one: Any, where: str, length: int) -> tuple[int, int, str]:
    if not isinstance(one, Mapping):
        raise LuthierError(f"`{where}` must be an object with start, stop and label, not {kind_of(one)}")
    start, stop = one.get("start"), one.get("stop", one.get("end"))
    label = checked_text(one.get("label"), f"{where}: label")
    if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= length:
        raise LuthierError(
            f"`{where}` is from {start} to {stop}, and the text has {length} characters",
            fix="give the first character, from 0, as `start` and the one behind the last as `stop`",
        )
    return start, stop, _one_line(label, where)


def _checked_tag(tag: Any, where: str) -> str:
    return _one_line(checked_text(tag, where), where)


def _one_line(label: str, where: str) -> str:
    if "\n" in label:
        raise LuthierError(f"`{where}` holds a line break", fix="name labels without one")
    return label


def _parted(start: int, stop: int, edges: set[int]) -> list[tuple[int, int]]:
    places = [start, *sorted(edge for edge in edges if start < edge < stop), stop]
    return list(pairwise(places))
