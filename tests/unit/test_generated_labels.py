"""Rows with a label whose answers are generated: what was told for what, class by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest

from luthier.evaluate.answered import OTHER
from luthier.evaluate.compare import compare
from luthier.evaluate.sets import EvalSet, SetResult, measure
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.report.facts import sets_of
from luthier.report.html import report_page
from luthier.rows.read import read
from luthier.tune import Tune

LABELS = ["praise", "praise", "praise", "blame", "blame", "neither"]
ROWS = [{"id": f"r{number}", "text": f"Text {number}.", "label": label} for number, label in enumerate(LABELS)]


@cache
def tune() -> Tune:
    model = tiny("llama", layers=1)
    return Tune(model, map_parts(model))


def measured(metric: Any, rows: Sequence[dict[str, Any]] = ROWS) -> SetResult:
    return measure(tune(), tiny_tokenizer(), [EvalSet("held", read(rows), metric)])["held"]


def test_each_class_before_and_after(answering: Callable[..., None]) -> None:
    """Of `praise` there are 3; before 2 are named, 1 rightly: precision 1/2, recall 1/3, F1 2/5."""
    answering(["Praise.", "blame", "blame", "praise", "blame", "hm"], ["praise", "PRAISE", "blame", "blame", "blame", "neither"])
    before, after = measured("exact_match"), measured("exact_match")
    assert (before.value, after.value) == (pytest.approx(2 / 6), pytest.approx(5 / 6))
    entry = compare(before, after)
    found = entry["by_class"]
    assert list(found) == ["praise", "blame", "neither", OTHER]
    assert found["praise"] == {
        "n": 3,
        "before": {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5},
        "after": {"precision": 1.0, "recall": 2 / 3, "f1": 4 / 5},
    }
    assert found["blame"]["before"] == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5}
    assert found["neither"]["before"] == {"precision": None, "recall": 0.0, "f1": 0.0} and found["neither"]["after"]["f1"] == 1.0
    assert found[OTHER] == {
        "n": 0, "before": {"precision": 0.0, "recall": None, "f1": 0.0}, "after": {"precision": None, "recall": None, "f1": None},
    }  # fmt: skip
    assert entry["confusion"]["praise"] == {"praise": 2, "blame": 1, "neither": 0, OTHER: 0}
    assert entry["confusion"]["blame"] == {"praise": 0, "blame": 2, "neither": 0, OTHER: 0}
    run = {"metrics": {"held": entry}}
    assert [one.name for one in sets_of(run)[0].classes] == [*found]
    assert "class by class" in report_page(run) and "neither" in report_page(run)


def test_an_answer_that_is_right_is_not_another_class(answering: Callable[..., None]) -> None:
    """`contains` finds both labels in one answer, and counts it as right."""
    answering(["no blame but praise"] * 6)
    result = measured("contains")
    assert [item.score for item in result.items] == [1, 1, 1, 1, 1, 0]
    assert [item.counts for item in result.items] == [
        *[{"praise": (1, 1, 1)}] * 3,
        *[{"blame": (1, 1, 1)}] * 2,
        {"neither": (1, 0, 0), "praise": (0, 1, 0)},
    ]


def test_numbers_are_classes_and_free_texts_are_none(answering: Callable[..., None]) -> None:
    answering(["1", "2"])
    found = measured("exact_match", [{"text": "a", "label": 1}, {"text": "b", "label": 1}])
    assert [item.counts for item in found.items] == [{"1": (1, 1, 1)}, {"1": (1, 0, 0), OTHER: (0, 1, 0)}]
    answering(["a"] * 101)
    many = measured("exact_match", [{"text": "a", "label": f"label {number}"} for number in range(101)])
    assert all(not item.counts for item in many.items)
    answering(["a"] * 2)
    for metric, rows in (
        ("exact_match", [{"prompt": "a", "answer": "a"}] * 2),
        ("exact_match", [{"text": "a", "label": 0.5}] * 2),
        ("exact_match", [{"text": "a", "label": ["a", "b"]}] * 2),
        (lambda answer, row: 1.0, [{"text": "a", "label": "a"}] * 2),
        ("repetition", [{"text": "a", "label": "a"}] * 2),
    ):
        assert all(not item.counts for item in measured(metric, rows).items)
