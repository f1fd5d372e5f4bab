"""Answers that should be JSON: what equals what, what share of the keys is right, and the options."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.evaluate.sets import EvalSet
from luthier.rows.json_answers import can_match, json_key_accuracy, json_match
from luthier.rows.read import read

WANTED = '{"name": "Mara", "age": 36, "tags": ["a", {"b": null}], "ok": true}'
"""Five values: name, age, tags[0], tags[1].b and ok."""


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (WANTED, 1.0),
        (' {"ok": true, "tags": ["a", {"b": null}], "age": 36.0, "name": "Mara"}\n', 1.0),
        (WANTED.replace("36", '"36"'), 4 / 5),
        (WANTED.replace("true", "1"), 4 / 5),
        (WANTED.replace("null", "0"), 4 / 5),
        (WANTED.replace("Mara", "mara"), 4 / 5),
        # A key too many is a sixth, a key too few leaves four of five.
        (WANTED.replace('"ok"', '"more": 1, "ok"'), 5 / 6),
        (WANTED.replace(', "ok": true', ""), 4 / 5),
        # a at 0 and b at 1 of two places: neither is where it should be, and tags[0].b and tags[1] are new.
        (WANTED.replace('["a", {"b": null}]', '[{"b": null}, "a"]'), 3 / 7),
        (WANTED.replace('["a", {"b": null}]', "[]"), 3 / 6),
        ("{}", 0 / 6),
        ("[]", 0.0),
        ("3", 0.0),
        (f"```json\n{WANTED}\n```", 0.0),
        (f"{WANTED} {WANTED}", 0.0),
        (WANTED.replace("36", "NaN"), 0.0),
        (WANTED.replace('"age"', '"name"'), 0.0),
        ("[" * 5000 + "]" * 5000, 0.0),
        ("", 0.0),
    ],
)
def test_shares_of_keys(answer: str, share: float) -> None:
    assert json_key_accuracy(answer, [WANTED]) == pytest.approx(share)
    assert json_match(answer, [WANTED]) == float(share == 1.0)
    assert json_match(answer, ["no JSON", WANTED]) == float(share == 1.0) and json_match(answer, []) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("3", "3.0", True),
        ("3", "true", False),
        ('""', "null", False),
        ("{}", "[]", False),
        ("{}", "{}", True),
        ('{"a": {}}', '{"a": []}', False),
        ('{"0": 1}', "[1]", False),
        ("1e999", "1e999", True),
        ("1" + "0" * 400, "1.5", False),
        ("1" + "0" * 400, "1" + "0" * 400, True),
    ],
)
def test_types_count(one: str, other: str, same: bool) -> None:
    assert json_match(one, [other]) == json_match(other, [one]) == float(same)


def test_the_best_of_several_accepted_answers_counts() -> None:
    assert json_key_accuracy('{"a": 1, "b": 2}', ['{"a": 3, "b": 3}', '{"a": 1, "b": 3}', "none"]) == pytest.approx(0.5)


def test_options() -> None:
    answer = '{"name": "Mara", "age": 36.4, "note": "x"}'
    accepted = ['{"name": "Mara", "age": 36}']
    assert json_match(answer, accepted, required=["name"]) == 1.0
    assert json_match(answer, accepted, required=["name", "age"]) == 0.0
    assert json_match(answer, accepted, required=["name", "age"], tolerance=0.5) == 1.0
    assert json_match(answer, accepted, tolerance=0.5) == 0.0, "nothing but what was expected"
    assert json_key_accuracy(answer, accepted, tolerance=0.5) == pytest.approx(2 / 3)
    assert json_key_accuracy(answer, accepted, required=["age"]) == 0.0
    assert json_match("3.5", ["3"], tolerance=0.5) == 1.0 and json_match("3.51", ["3"], tolerance=0.5) == 0.0
    assert json_match("true", ["1"], tolerance=1) == 0.0, "a truth is no number"
    assert json_match("[1]", accepted, required=["name"]) == 0.0
    deep = ['{"at": {"x": 1}, "x": 2}']
    assert json_match('{"at": {"x": 1}, "x": 3}', deep, required=["at"]) == 1.0, "of the outermost object"
    assert json_match('{"at": {"x": 9}, "x": 2}', deep, required=["x"]) == 1.0
    assert [can_match(one, ["name"]) for one in ('{"name": 1}', '{"age": 1}', '["name"]', "name", "1")] == [True] + [False] * 4
    assert can_match("1") and not can_match("{")


def one_set(answer: str, metric: Any) -> EvalSet:
    return EvalSet("held", read([{"id": "a", "prompt": "Say it.", "answer": answer}]), metric)


def test_options_come_from_the_recipe() -> None:
    score = one_set('{"name": 3, "age": 1}', {"json_match": {"required": ["name"], "tolerance": 0.5}}).chosen.scoring.score
    assert score is not None and score('{"name": 3.5}', ['{"name": 3, "age": 1}']) == 1.0
    plain = one_set('{"name": 3}', {"json_key_accuracy": None}).chosen.scoring.score
    assert plain is not None and plain('{"name": 3.5}', ['{"name": 3}']) == 0.0


@pytest.mark.parametrize(
    ("answer", "metric", "words"),
    [
        ("{", "json_match", ["no answer could ever equal `{`", "row a"]),
        ('{"age": 1}', {"json_match": {"required": ["name"]}}, ["no answer could ever equal"]),
        ("{}", {"json_match": {"tolerance": -1}}, ["`tolerance` is -1", "evaluation set `held`"]),
        ("{}", {"json_match": {"tolerance": "x"}}, ["the option `tolerance`", "luthier metrics json_match"]),
        ("{}", {"json_match": {"reqired": ["a"]}}, ["no option `reqired`", "required"]),
        ("{}", {"json_match": 3}, ["must be a mapping"]),
        ("{}", {"json_match": {}, "equal": {}}, ["one metric at a time"]),
        ("{}", {}, ["one metric at a time"]),
        ("{}", {"equal": {"strict": True}}, ["`equal` has no options"]),
        ("{}", "jsonmatch", ["no metric `jsonmatch`", "json_match"]),
        ("{}", 3, ["no metric `3`"]),
    ],
)
def test_mistakes_are_named(answer: str, metric: Any, words: list[str]) -> None:
    with pytest.raises(LuthierError) as caught:
        one_set(answer, metric)
    assert all(word in str(caught.value) for word in words), caught.value
