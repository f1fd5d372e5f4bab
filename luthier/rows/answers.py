"""How an answer is scored against the accepted ones: by evaluation metrics, by rewards, and when rows are judged.

Answers are compared word by word, not as raw text: case, punctuation, spacing, Unicode spellings (full-width letters,
curly quotes) and commas within numbers do not count. `equal` and `tool_call` are the exceptions: there every letter does.

`type_token_ratio` and `repetition` look at the answer alone and need no accepted ones.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

Score = Callable[[str, Sequence[str]], float]
"""An answer and the accepted answers, to a score from 0 to 1."""


WINDOW = 96
"""Words at the start of an answer that `type_token_ratio` looks at, as hyperfitting does (Carlsson et al., 2024)."""


RUN = 4
"""Words in a row that `repetition` compares."""


_ARTICLES = frozenset({"a", "an", "the"})


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


# Thai, Lao, Myanmar, Khmer, kana, ideographs, Hangul: scripts that set no space before every word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\U00020000-\U000323af"


# A sign counts only where nothing stands before it: `5-3` ends in 3, `x = -3` in -3.
_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d+(?:\.\d+)?|(?<!\w)\.\d+)")


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


def equal(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer is letter for letter an accepted one, but for white space around either, else 0."""
    return float(any(answer.strip() == one.strip() for one in accepted))


def last_number(answer: str, accepted: Sequence[str]) -> float:
    """1 where the last number in the answer equals the last number in an accepted one, else 0.

    Numbers are compared by value: `1,347`, `1347` and `+1347.0` are one, `\u22125` is -5 and `.5` is 0.5. A comma counts as one
    between thousands where exactly three digits follow it. What stands around a number is ignored, such as `$12`, `12%` or
    `12th`; powers of ten (`1e5`) and fractions (`3/4`) are not read: their last digits are.
    """
    found = last_number_of(answer)
    return float(found is not None and any(found == last_number_of(one) for one in accepted))


def tool_call(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer is a tool call that equals an accepted one, else 0.

    A call is JSON and nothing beside it: an object of a `name`, which is text, and `arguments`, an object. Keys may come in any
    order, lists may not. Types count: 3 is neither "3" nor true, while 3 and 3.0 are the same number.
    """
    call = call_of(answer)
    return float(call is not None and any(_same(call, call_of(one)) for one in accepted))


def type_token_ratio(answer: str, accepted: Sequence[str] = (), *, window: int = WINDOW) -> float:
    """Distinct words among the first words of an answer, as a share of them; 0 where it has no words.

    An answer that ends early has fewer words, and so a larger share of distinct ones: compare answers of about one length, with
    room for `window` words in `max_new_tokens`.

    Args:
        answer: what the model said.
        accepted: not looked at.
        window: the most words that are counted, from the start.
    """
    words = words_of(answer)[:window]
    return len(set(words)) / len(words) if words else 0.0


def repetition(answer: str, accepted: Sequence[str] = (), *, run: int = RUN) -> float:
    """The share of the runs of words in an answer that stood in it before; 0 where it is shorter than one run.

    An answer that ends early has had less room to repeat itself.

    Args:
        answer: what the model said.
        accepted: not looked at.
        run: words in a row that are compared; runs overlap.
    """
    words = words_of(answer)
    runs = [words[start : start + run] for start in range(len(words) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text as `contains` compares them."""
    return tuple(_WORD.findall(_THOUSANDS.sub("", _folded(text))))


def runs_of_letters(text: str) -> list[str]:
    """The runs of letters and digits in a text, in lower case; of a script that sets no spaces, each sign."""
    return re.findall(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+", _folded(text))


def _folded(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    return plain.casefold()


def last_number_of(text: str) -> Decimal | None:
    """The last number in a text; None where it has none."""
    found: list[str] = _NUMBER.findall(_THOUSANDS.sub("", _folded(text)))
    return Decimal(found[-1]) if found else None


def call_of(text: str) -> dict[str, Any] | None:
    """A tool call as data; None where the text is none."""
    try:
        call = strict_json(text)
    # Also a number of thousands of digits, or brackets a thousand deep.
    except (ValueError, RecursionError):
        return None
    whole = isinstance(call, dict) and set(call) == {"name", "arguments"}
    return call if whole and isinstance(call["name"], str) and isinstance(call["arguments"], dict) else None


def strict_json(text: str) -> Any:
    """A text's JSON, in which no key comes twice and every number is one.

    Raises:
        ValueError: the text is no such JSON, or holds a number of thousands of digits.
        RecursionError: brackets stand a thousand deep.
    """
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are equal, where true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return set(one) == set(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


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
