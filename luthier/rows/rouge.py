"""ROUGE: how much of what an answer and an accepted one say is in both, by runs of words (Lin, 2004).

Words are runs of letters and digits, in lower case and not stemmed, as in the package rouge-score, which knows ASCII alone: here other
letters count as well, and each sign of a script without spaces is a word. Values are F1, of several accepted answers the best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from luthier.rows.answers import runs_of_letters

Words = Sequence[str]


def rouge_1(answer: str, accepted: Sequence[str]) -> float:
    """F1 of the words that the answer shares with the accepted one it fits best, each as often as both have it (Lin, 2004)."""
    return _best(answer, accepted, lambda one, other: _of_runs(one, other, 1))


def rouge_2(answer: str, accepted: Sequence[str]) -> float:
    """F1 of the pairs of neighboring words that the answer shares with the accepted one it fits best (Lin, 2004)."""
    return _best(answer, accepted, lambda one, other: _of_runs(one, other, 2))


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """F1 of the longest sequence of words, gaps allowed, that stands in the answer and in the accepted one it fits best (Lin, 2004).

    Answers are read as one sentence: this is rougeL of rouge-score, and not rougeLsum.
    """
    return _best(answer, accepted, lambda one, other: _f1(longest_common(one, other), len(one), len(other)))


def longest_common(one: Words, other: Words) -> int:
    """The length of the longest sequence that stands in both, gaps allowed."""
    # One bit for each place of `other`: a row of the usual table in a few operations on one large number (Hyyro, 2004).
    places: dict[str, int] = {}
    for place, word in enumerate(other):
        places[word] = places.get(word, 0) | 1 << place
    whole = row = (1 << len(other)) - 1
    for word in one:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & whole
    return len(other) - row.bit_count()


def _best(answer: str, accepted: Sequence[str], score: Callable[[Words, Words], float]) -> float:
    words = runs_of_letters(answer)
    return max((score(words, runs_of_letters(one)) for one in accepted), default=0.0)


def _of_runs(one: Words, other: Words, size: int) -> float:
    mine, theirs = (Counter(zip(*(words[start:] for start in range(size)), strict=False)) for words in (one, other))
    return _f1((mine & theirs).total(), mine.total(), theirs.total())


def _f1(shared: int, mine: int, theirs: int) -> float:
    """2 P R / (P + R) of precision shared / mine and recall shared / theirs; 0 where nothing is shared."""
    return 2 * shared / (mine + theirs) if shared else 0.0
