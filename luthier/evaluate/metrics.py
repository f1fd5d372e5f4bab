"""Metrics: what is measured on a set of rows, and how an answer is scored against the accepted ones.

Answers are compared word by word, not as raw text: case, punctuation, spacing, Unicode spellings (full-width letters,
curly quotes) and commas within numbers do not count.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

Score = Callable[[str, Sequence[str]], float]
"""An answer and the accepted answers, to a score from 0 to 1."""

_ARTICLES = frozenset({"a", "an", "the"})
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# Thai, Lao, Myanmar, Khmer, kana, ideographs, Hangul: scripts that set no space before every word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\U00020000-\U000323af"
# In order: a number with its sign and fraction; a letter of an unspaced script; a word, with what C++ and A+ end in.
# `_` is punctuation here.
_WORD = re.compile(rf"(?<!\w)-?\d+(?:\.\d+)*(?![^\W_{_UNSPACED}])|[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:[+#]+(?!\w))?")


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer is one of the accepted ones, else 0, after SQuAD's normalization (Rajpurkar et al., 2016):
    lower case, without punctuation, articles and extra spaces."""
    words = _squad_words(answer)
    return float(any(words == _squad_words(one) for one in accepted))


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """The harmonic mean of the precision and recall of words, against the accepted answer it fits best; words as in
    `exact_match`, order free (Rajpurkar et al., 2016)."""
    return max((_f1(_squad_words(answer), _squad_words(one)) for one in accepted), default=0.0)


def contains(answer: str, accepted: Sequence[str]) -> float:
    """1 where any accepted answer stands in the answer as whole words, else 0: `12` is not in `2012`, `12.5` or `12th`,
    `1347` is in `in 1,347.`."""
    words = words_of(answer)
    return float(any(_stands_in(one, words, answer) for one in accepted))


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text as `contains` compares them."""
    return tuple(_WORD.findall(_THOUSANDS.sub("", _folded(text))))


class Metric(NamedTuple):
    """What a metric is."""

    needs: Literal["generation", "choice", "likelihood"]
    """Generated answers, the likelihoods of given choices, or the likelihood of the row's own text."""
    higher_is_better: bool
    meaning: str
    score: Score | None = None
    """How a generated answer is scored."""


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric("generation", True, "share of answers that are an accepted one", exact_match),
    "f1": Metric("generation", True, "mean overlap of words with an accepted answer", token_f1),
    "contains": Metric("generation", True, "share of answers in which an accepted one stands", contains),
    "choice": Metric("choice", True, "share of items whose most likely choice is right"),
    "choice_normalized": Metric("choice", True, "share of items whose most likely choice, per byte, is right"),
    "loss": Metric("likelihood", False, "mean negative log-likelihood of a target token, in nats"),
    "perplexity": Metric("likelihood", False, "e to the power of the loss"),
}
"""Metrics by name. `choice` and `choice_normalized` are `acc` and `acc_norm` of the LM Evaluation Harness: the
log-likelihoods of a choice's tokens are summed, and in `choice_normalized` divided by its UTF-8 bytes."""


def _folded(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    return plain.casefold()


def _stands_in(accepted: str, words: tuple[str, ...], answer: str) -> bool:
    wanted = words_of(accepted)
    if not wanted:
        # Nothing but signs, such as `?!`: an empty sequence of words would stand in every answer.
        return bool(accepted.strip()) and _folded(accepted).strip() in _folded(answer)
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words) - len(wanted) + 1))


def _squad_words(text: str) -> list[str]:
    kept = "".join(letter for letter in _folded(text) if not _is_punctuation(letter))
    words = kept.split() or text.split()
    # `A` may be the whole answer: without this guard silence would match it.
    return [word for word in words if word not in _ARTICLES] or words


def _is_punctuation(letter: str) -> bool:
    category = unicodedata.category(letter)
    return category.startswith("P") or (letter.isascii() and category.startswith("S"))


def _f1(words: Sequence[str], accepted: Sequence[str]) -> float:
    shared = (Counter(words) & Counter(accepted)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(accepted)
    return 2 * precision * recall / (precision + recall)
