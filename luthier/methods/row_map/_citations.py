"""Citations such as `[2]` in answers from retrieved passages, as PA-RAG (Wu et al., 2025) judges and rewrites them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import NamedTuple

MARK = re.compile(r"\s*\[(\d+)\]")
_STATEMENT = re.compile(r".*?[.!?][\"')]*(?:\s*\[\d+\])*(?=\s|$)\s*|.+$", re.DOTALL)
_END = re.compile(r"[.!?\"')]*\s*$")
MOST = 3
"""Passages that are cited together for one statement at most, where citations are looked for."""

Entails = Callable[[str, Sequence[int]], bool]
"""`entails(statement, numbers)`: whether these passages, numbered from 1, together entail a statement without its marks."""


class Statement(NamedTuple):
    """A sentence of an answer."""

    text: str
    """As it is written, with its marks and the space behind it."""

    @property
    def bare(self) -> str:
        """Without marks and the space around it."""
        return MARK.sub("", self.text).strip()

    @property
    def marks(self) -> tuple[int, ...]:
        """The passages it cites, in their order."""
        return tuple(int(number) for number in MARK.findall(self.text))


def statements_of(answer: str) -> list[Statement]:
    """The sentences of an answer, which together are its text; each ends in a full stop and the marks behind it."""
    return [Statement(found.group()) for found in _STATEMENT.finditer(answer)]


def is_supported(statement: Statement, entails: Entails, passages: int) -> bool:
    """Whether the passages that a statement cites entail it; none, or one that does not exist, is no support."""
    marks = statement.marks
    return bool(marks) and all(1 <= mark <= passages for mark in marks) and entails(statement.bare, marks)


def recall(statements: Sequence[Statement], entails: Entails, passages: int) -> float:
    """The share of an answer's statements that are supported."""
    return sum(is_supported(one, entails, passages) for one in statements) / len(statements)


def precision(statements: Sequence[Statement], entails: Entails, passages: int) -> float:
    """The share of an answer's marks that are precise: of a supported statement those that entail it alone, or without which the others
    do not. Marks of passages that do not exist are counted, too; an answer without marks has 0."""
    marks = sum(len(one.marks) for one in statements)
    precise = sum(_precise(one, entails) for one in statements if is_supported(one, entails, passages))
    return precise / marks if marks else 0.0


def _precise(statement: Statement, entails: Entails) -> int:
    marks = statement.marks
    others = [[*marks[:place], *marks[place + 1 :]] for place in range(len(marks))]
    return sum(
        entails(statement.bare, [mark]) or not entails(statement.bare, rest) for mark, rest in zip(marks, others, strict=True)
    )


def rewritten(statement: Statement, entails: Entails, passages: int) -> Statement:
    """A statement that cites what entails it, and no more than is needed: its own passages, or else the fewest that do, at most three, the
    first of them; nothing where none do. What is redundant goes from the last mark on."""
    every = range(1, passages + 1)
    own = tuple(dict.fromkeys(mark for mark in statement.marks if mark in every))
    offers = chain([own], *(combinations(every, count) for count in range(1, MOST + 1)))
    cited = list(next((offer for offer in offers if offer and entails(statement.bare, offer)), ()))
    for mark in reversed(cited.copy()):
        rest = [one for one in cited if one != mark]
        cited = rest if rest and entails(statement.bare, rest) else cited
    return statement if tuple(cited) == statement.marks else _citing(statement.text, cited)


def _citing(text: str, marks: Sequence[int]) -> Statement:
    """A statement with other marks: where its first one stood, or before its end."""
    first, end = MARK.search(text), _END.search(text)
    assert end is not None
    place, gap = (first.start(), first.group().partition("[")[0]) if first is not None else (end.start(), " ")
    written = gap + "".join(f"[{mark}]" for mark in marks) if marks else ""
    return Statement(text[:place] + written + MARK.sub("", text[place:]))


def moved_marks(answer: str, before: Sequence[str], now: Sequence[str]) -> str:
    """An answer whose marks count other passages: each is that of the same text, and goes where there is none.

    Args:
        answer: with marks, from 1.
        before: the passages that it counts.
        now: those that it shall count.
    """
    place = {passage.strip(): number for number, passage in reversed([*enumerate(now, 1)])}
    moved = {number: place.get(passage.strip()) for number, passage in enumerate(before, 1)}

    def other(found: re.Match[str]) -> str:
        number = moved.get(int(found[1]))
        return "" if number is None else found.group().replace(f"[{found[1]}]", f"[{number}]")

    return MARK.sub(other, answer)
