"""Scores of answers, worked out by hand."""

from __future__ import annotations

import pytest

from luthier.evaluate.metrics import METRICS
from luthier.rows.answers import (
    contains,
    equal,
    exact_match,
    last_number,
    repetition,
    token_f1,
    tool_call,
    type_token_ratio,
    words_of,
)


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
    scored = {"exact_match", "f1", "contains", "equal", "last_number", "tool_call", "tool_calls", "type_token_ratio", "repetition"}
    scored |= {"rouge_1", "rouge_2", "rouge_l", "json_match", "json_key_accuracy", "judge"}
    assert {name for name, one in METRICS.items() if one.needs == "generation"} == scored
    assert all((one.score is not None or one.make is not None) == (one.needs == "generation") for one in METRICS.values())
    assert {name for name, one in METRICS.items() if not one.higher_is_better} == {
        *("loss", "perplexity", "repetition", "mean_absolute_error", "expected_calibration_error"),
    }


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        (" k r v z\n", ["k r v z"], True),
        ("k r v z", ["z", "k r v z "], True),
        ("K r v z", ["k r v z"], False),
        ("k  r v z", ["k r v z"], False),
        ("k r v z.", ["k r v z"], False),
        ("caf\u00e9", ["cafe\u0301"], False),
        ("", ["a"], False),
        ("a", [], False),
    ],
)
def test_equal_is_letter_for_letter(answer: str, accepted: list[str], right: bool) -> None:
    assert equal(answer, accepted) == float(right)


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("1,347", ["1347"], True),
        ("1347", ["1347.0"], True),
        ("It is 12 and then 13.", ["13"], True),
        ("It is 13 and then 12.", ["13"], False),
        ("4 + 2 = 6; 6 + 3 = 9", ["9"], True),
        ("x = -3", ["-3"], True),
        ("x = -3", ["3"], False),
        ("x = \u22123", ["-3"], True),
        ("+3", ["3"], True),
        ("5-3", ["3"], True),
        ("(5)-3", ["3"], True),
        ("-0", ["0"], True),
        ("1,234,567.50 in all", ["1234567.5"], True),
        # Two digits after a comma: two numbers, the last of them 34.
        ("12,34", ["34"], True),
        (".5", ["0.5"], True),
        ("-.5", ["-0.5"], True),
        ("0.1", ["0.10000000000000001"], False),
        ("$12%", ["12"], True),
        ("the 12th", ["12"], True),
        ("version 1.2.3", ["3"], True),
        ("3/4", ["4"], True),
        ("1e5", ["5"], True),
        ("\uff11\uff12", ["12"], True),
        ("\u0663", ["3"], True),
        ("9" * 5000, ["9" * 5000], True),
        ("12", ["about 12 or so"], True),
        ("none", ["none"], False),
        ("", ["1"], False),
        ("1", [], False),
    ],
)
def test_last_numbers_compare_by_value(answer: str, accepted: list[str], right: bool) -> None:
    assert last_number(answer, accepted) == float(right)


CALL = '{"name": "weather", "arguments": {"city": "Uldra", "days": 3, "now": true, "at": [1, {"a": null}]}}'


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (CALL, True),
        (f"\n {CALL} ", True),
        ('{"arguments": {"at": [1.0, {"a": null}], "now": true, "days": 3.0, "city": "Uldra"}, "name": "weather"}', True),
        (CALL.replace("3", '"3"'), False),
        (CALL.replace("true", "1"), False),
        (CALL.replace("[1,", "[true,"), False),
        (CALL.replace("null", "0"), False),
        (CALL.replace("Uldra", "uldra"), False),
        (CALL.replace('[1, {"a": null}]', '[{"a": null}, 1]'), False),
        (CALL.replace('[1, {"a": null}]', "[1]"), False),
        (CALL.replace('"days": 3, ', ""), False),
        (CALL.replace('"days": 3', '"days": 3, "days": 3'), False),
        (CALL[:-1] + ', "id": 1}', False),
        (f"Sure: {CALL}", False),
        (CALL + CALL, False),
        (CALL[:-1], False),
        ('{"name": "weather"}', False),
        ('{"name": 3, "arguments": {}}', False),
        ('{"name": "weather", "arguments": []}', False),
        ("[" * 5000 + "]" * 5000, False),
        ('{"name": "weather", "arguments": {"days": ' + "9" * 5000 + "}}", False),
        (CALL.replace("3", "NaN"), False),
        ("null", False),
        ("", False),
    ],
)
def test_a_tool_call_counts_whole_and_with_types(answer: str, right: bool) -> None:
    assert tool_call(answer, ["no call", CALL]) == float(right)
    assert tool_call(answer, []) == 0.0


def test_a_call_that_is_none_equals_nothing() -> None:
    assert tool_call("no call", ["no call"]) == 0.0


@pytest.mark.parametrize(
    ("text", "window", "ratio"),
    [
        ("a b a b", 4, 0.5),
        ("a b c d", 4, 1.0),
        ("A a, a!", 96, 1 / 3),
        # Only the first four words count: a, b, a, c.
        ("a b a c a a a a", 4, 0.75),
        ("a b", 4, 1.0),
        ("?!", 4, 0.0),
        ("", 4, 0.0),
        # 60 words, then 60 others: 96 within the window, all distinct until the repetition begins.
        (" ".join(f"w{i % 60}" for i in range(120)), 96, 60 / 96),
    ],
)
def test_type_token_ratio(text: str, window: int, ratio: float) -> None:
    assert type_token_ratio(text, window=window) == pytest.approx(ratio, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c", 0.0),
        ("a b c d", 0.0),
        # abcd, bcda, cdab, dabc, abcd: the last of five came before.
        ("a b c d a b c d", 1 / 5),
        # One run, seven times: six of seven came before.
        ("go " * 10, 6 / 7),
        ("Go, go! GO go - go", 0.5),
        ("", 0.0),
    ],
)
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share, abs=1e-12)


def test_some_metrics_look_at_the_answer_alone() -> None:
    alone = {name for name, one in METRICS.items() if not one.compares and one.make is None}
    assert alone == {"type_token_ratio", "repetition"}
    for name in alone:
        score = METRICS[name].score
        assert score is not None and score("a a a a a", []) == score("a a a a a", ["anything"])


def test_metrics_know_what_can_be_accepted() -> None:
    texts = {"no number": set[str](), "about 3": {"last_number"}, CALL: {"last_number", "tool_call"}}
    for text, readable in texts.items():
        found = {name for name in ("last_number", "tool_call") if METRICS[name].readable(text)}
        assert found == readable
        assert METRICS["contains"].readable(text)


def test_what_answers_are_measured_by_where_nothing_else_is_said() -> None:
    assert type_token_ratio(" ".join(f"w{number}" for number in range(96)) + " w0") == 1.0
    assert type_token_ratio(" ".join(f"w{number}" for number in range(95)) + " w0") == 95 / 96
    assert repetition("a b c d e a b c d") == pytest.approx(1 / 6) and token_f1("a word", []) == 0.0
