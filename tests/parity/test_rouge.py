"""ROUGE beside the package rouge-score, and by hand."""

from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from luthier.rows.rouge import longest_common, rouge_1, rouge_2, rouge_l

OURS = {"rouge1": rouge_1, "rouge2": rouge_2, "rougeL": rouge_l}
WORDS = ("the", "The", "red", "mill's", "mill", "12", "1,347", "a_b", "no", "door.", "(gate)", "--", "well-kept", "x")


def texts(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randrange(14)))


def test_values_are_those_of_rouge_score() -> None:
    theirs = RougeScorer([*OURS], use_stemmer=False)
    draw = random.Random(0)
    for _ in range(300):
        answer, accepted = texts(draw), [texts(draw) for _ in range(draw.randrange(1, 3))]
        wanted = theirs.score_multi(accepted, answer)
        for name, score in OURS.items():
            assert score(answer, accepted) == pytest.approx(wanted[name].fmeasure, abs=1e-12), (name, answer, accepted)


def test_by_hand() -> None:
    """`police killed the gunman` against two sentences of Lin (2004, section 3.1): both share three words, one in the same order."""
    answer = "police killed the gunman"
    assert rouge_l("police kill the gunman", [answer]) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", [answer]) == pytest.approx(2 / 4)
    assert rouge_1("the gunman kill police", [answer]) == pytest.approx(3 / 4)
    # `the gunman` of three pairs each.
    assert rouge_2("the gunman kill police", [answer]) == pytest.approx(1 / 3)
    # Unlike lengths: 2 of 2 and 2 of 4 words are 2 * 2 / (2 + 4).
    assert rouge_1("the gunman", [answer]) == pytest.approx(2 / 3)
    assert rouge_1("the the", ["the"]) == pytest.approx(2 / 3), "a word counts as often as both have it"
    assert rouge_2("the", ["the"]) == 0.0 and rouge_l("", ["the"]) == 0.0 and rouge_l("the", []) == 0.0
    assert rouge_l("a b", ["x", "a b c"]) == pytest.approx(4 / 5), "of several accepted answers the best"


def test_letters_outside_ascii_count() -> None:
    assert rouge_1("Stra\u00dfe \u00e4rger", ["STRASSE \u00e4rger"]) == 1.0
    assert rouge_l("\u6771\u4eac\u90fd", ["\u4eac\u90fd"]) == pytest.approx(2 * 2 / 5)


def test_the_longest_common_sequence_is_that_of_the_table() -> None:
    """The usual table of lengths, row by row."""
    draw = random.Random(1)
    for _ in range(100):
        one, other = ([draw.choice("abc") for _ in range(draw.randrange(90))] for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, first in enumerate(one):
            for j, second in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if first == second else max(table[i][j + 1], table[i + 1][j])
        assert longest_common(one, other) == table[-1][-1]
