"""Scores of answers, worked out by hand."""

from __future__ import annotations

import pytest

from luthier.evaluate.metrics import METRICS, contains, exact_match, token_f1, words_of


@pytest.mark.parametrize(
    ("answer", "accepted", "found"),
    [
        ("12", ["12"], True),
        ("in 2012", ["12"], False),
        ("the 12th", ["12"], False),
        ("12.5", ["12"], False),
        ("about 12.", ["12"], True),
        ("(12)", ["12"], True),
        ("Founded in 1,347.", ["1347"], True),
        ("Founded in 1347.", ["1,347"], True),
        ("1,347,000 people", ["1347000"], True),
        ("rooms 12,34", ["1234"], False),
        ("it is -5 degrees", ["5"], False),
        ("it is \u22125 degrees", ["-5"], True),
        ("from 1990-1995", ["1995"], True),
        ("The mayor is Tamsin  Quarrel!", ["tamsin quarrel"], True),
        ("Tamsin\nQuarrel's house", ["Tamsin Quarrel"], True),
        ("Tamsin of Quarrel", ["Tamsin Quarrel"], False),
        ("Tamsinquarrel", ["Tamsin"], False),
        ("\uff34\uff21\uff2d\uff33\uff29\uff2e", ["Tamsin"], True),
        ("the Stra\u00dfe", ["STRASSE"], True),
        ("caf\u00e9", ["cafe\u0301"], True),
        ("O\u2019Neill", ["O'Neill"], True),
        ("written in C++.", ["C"], False),
        ("written in C++.", ["C++"], True),
        ("5+3", ["3"], True),
        ("\u7b54\u3048\u306f\u6771\u4eac\u3067\u3059", ["\u6771\u4eac"], True),
        ("\u4eac\u6771", ["\u6771\u4eac"], False),
        ("\u7b2c12\u56de", ["12"], True),
        ("Paris or Rome", ["London", "Rome"], True),
        ("anything", ["?!"], False),
        ("what?!", ["?!"], True),
        ("", ["a"], False),
        ("anything", [], False),
    ],
)
def test_contains_finds_whole_words(answer: str, accepted: list[str], found: bool) -> None:
    assert contains(answer, accepted) == float(found)


def test_words_are_folded_and_apart() -> None:
    assert words_of("It\u2019s **1,347.50** \u20ac, not_C++!") == ("it", "s", "1347.50", "not", "c++")


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The Tower.", ["tower"], True),
        (" tower ", ["a tower", "door"], True),
        ("towers", ["tower"], False),
        ("the tower gate", ["tower"], False),
        ("1,347", ["1347"], True),
        ("A", ["a"], True),
        ("", ["A"], False),
        ("the", ["A"], False),
        ("!", ["?"], False),
        ("", ["?"], False),
        ("anything", [], False),
    ],
)
def test_exact_match_normalizes_like_squad(answer: str, accepted: list[str], right: bool) -> None:
    assert exact_match(answer, accepted) == float(right)


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("the red door", ["a red door"], 1.0),
        # One of two words, one of one: precision 1/2, recall 1.
        ("red door", ["red"], 2 / 3),
        # Precision 2/4, recall 2/3.
        ("red red door gate", ["red door mill"], 4 / 7),
        # A word counts as often as both have it: precision 1/3, recall 1.
        ("red red red", ["red"], 0.5),
        ("blue", ["red", "blue door"], 2 / 3),
        ("blue", ["red"], 0.0),
        ("", ["red"], 0.0),
        ("red", [], 0.0),
    ],
)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(answer: str, accepted: list[str], score: float) -> None:
    assert token_f1(answer, accepted) == pytest.approx(score, abs=1e-12)


def test_every_metric_says_what_it_needs() -> None:
    assert {name for name, one in METRICS.items() if one.needs == "generation"} == {"exact_match", "f1", "contains"}
    assert all((one.score is not None) == (one.needs == "generation") for one in METRICS.values())
    assert {name for name, one in METRICS.items() if not one.higher_is_better} == {"loss", "perplexity"}
