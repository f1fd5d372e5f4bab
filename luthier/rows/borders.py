"""Tokenizing a text so that no token crosses a border, such as that between a prompt and its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

Tokenize = Callable[[str], list[int]]


class Border(NamedTuple):
    """A place in a text where labels begin or end."""

    place: int
    begins: bool


def tokenized_at(tokenize: Tokenize, text: str, borders: Sequence[Border]) -> tuple[list[int], list[int]]:
    """The ids of a text, and how many of them stand before each border.

    Offsets are of no use here: many tokenizers trim spaces from them, and a character cut into bytes gives each of them
    the same. Instead the text before a border is tokenized by itself, as inference does it. Where its tokens are not
    the first tokens of the whole (a line break before the border that merges with one behind it), or where a special
    token before the border swallows spaces the model has to write, the text is cut at the border.
    """
    whole = tokenize(text)
    if not borders:
        return whole, []
    places = [0, *(border.place for border in borders), len(text)]
    parts = [tokenize(text[start:end]) for start, end in pairwise(places)]
    if [token for part in parts for token in part] == whole:
        return whole, list(accumulate(map(len, parts[:-1])))
    counts = []
    for number, (place, begins) in enumerate(borders):
        before = tokenize(text[:place])
        if whole[: len(before)] != before or (begins and _swallows(tokenize, text, place, whole)):
            head, head_counts = tokenized_at(tokenize, text[:place], borders[:number])
            later = [border._replace(place=border.place - place) for border in borders[number + 1 :]]
            tail, tail_counts = tokenized_at(_going_on(tokenize), text[place:], later)
            return head + tail, [*head_counts, len(head), *(len(head) + count for count in tail_counts)]
        counts.append(len(before))
    return whole, counts


def _swallows(tokenize: Tokenize, text: str, place: int, whole: Sequence[int]) -> bool:
    behind = text[place:]
    return behind[:1].isspace() and tokenize(text[:place] + behind.lstrip()) == whole


def _going_on(tokenize: Tokenize) -> Tokenize:
    """Tokenize text that stands behind other text: some tokenizers put a space before the beginning of a text."""

    def behind(text: str) -> list[int]:
        line_break, both = tokenize("\n"), tokenize("\n" + text)
        return both[len(line_break) :] if both[: len(line_break)] == line_break else tokenize(text)

    return behind
