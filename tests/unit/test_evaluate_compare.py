"""Verdicts on made-up results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.evaluate import compare as comparing
from luthier.evaluate.compare import base_noise, compare, share_retained
from luthier.evaluate.intervals import mcnemar, newcombe, wilson
from luthier.evaluate.items import Item
from luthier.evaluate.paired import Difference, difference_of, recorded, value_of, verdict_of
from luthier.evaluate.sets import EvalSet, SetResult, measure, result_of
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.rows.read import read
from luthier.tune import Tune


def result(
    scores: Sequence[float], metric: str = "contains", role: Any = "target", weights: Sequence[float] | None = None
) -> SetResult:
    record = {"text": "x"} if metric in ("loss", "perplexity") else {"prompt": "x", "answer": "y"}
    one = EvalSet("made up", read([record]), metric, role)
    weights = [1.0] * len(scores) if weights is None else weights
    items = [
        Item(f"row{i}", f"question {i}", f"answer {i}", f"said {score}", float(score), float(weight))
        for i, (score, weight) in enumerate(zip(scores, weights, strict=True))
    ]
    return result_of(one, items, asked="the same")


def test_the_entry_holds_what_reports_need() -> None:
    before, after = result([0, 0, 0, 0, 0, 0, 0, 0, 1, 1]), result([1, 1, 1, 1, 1, 1, 1, 0, 1, 0])
    entry = compare(before, after)
    assert entry["before"] == 0.2 and entry["after"] == 0.8 and entry["difference"] == pytest.approx(0.6)
    assert entry["before_interval"] == wilson(2, 10) and entry["after_interval"] == wilson(8, 10)
    assert entry["difference_interval"] == newcombe(1, 1, 7, 1)
    assert entry["p_value"] == mcnemar(1, 7) == pytest.approx(18 / 256)
    assert entry["verdict"] == "unclear" and entry["matters"] == 0.05
    assert entry["retained"] == 0.5
    assert (entry["metric"], entry["role"], entry["n"], entry["higher_is_better"]) == ("contains", "target", 10, True)
    assert entry["items"][9] == {
        "id": "row9",
        "prompt": "question 9",
        "expected": "answer 9",
        "before": "said 1",
        "after": "said 0",
        "before_score": 1.0,
        "after_score": 0.0,
    }
    assert json.loads(json.dumps(entry, allow_nan=False))["difference_interval"] == list(entry["difference_interval"])


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([0] * 6, [1] * 6, "better"),
        ([1] * 6, [0] * 6, "worse"),
        ([0] * 10, [1] * 5 + [0] * 5, "unclear"),
        ([0] * 60, [1] * 6 + [0] * 54, "better"),
        ([1] * 8, [1] * 8, "unclear"),
        ([1] * 99, [1] * 99, "no change"),
        ([0, 1] * 20, [1, 0] * 20, "unclear"),
        ([0] * 5, [1] * 5, "not measured"),
    ],
)
def test_verdicts_on_right_and_wrong(before: list[int], after: list[int], verdict: str) -> None:
    assert compare(result(before), result(after))["verdict"] == verdict


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_less_loss_is_better(metric: str) -> None:
    before = [2.0 + 0.1 * i for i in range(12)]
    lower = [value - 0.2 - 0.01 * i for i, value in enumerate(before)]
    weights = [10 + i for i in range(12)]
    better = compare(result(before, metric, weights=weights), result(lower, metric, weights=weights))
    worse = compare(result(lower, metric, weights=weights), result(before, metric, weights=weights))
    assert (better["verdict"], worse["verdict"]) == ("better", "worse")
    assert better["difference"] == pytest.approx(-worse["difference"])
    low, high = better["difference_interval"]
    assert low < better["difference"] < high < 0
    assert better["retained"] is None
    if metric == "loss":
        expected = sum(w * (a - b) for w, a, b in zip(weights, lower, before, strict=True)) / sum(weights)
        assert better["difference"] == pytest.approx(expected)


def test_the_same_loss_is_no_change() -> None:
    entry = compare(result([2.0, 3.0] * 6, "perplexity"), result([2.0, 3.0] * 6, "perplexity"))
    assert (entry["verdict"], entry["difference"], entry["difference_interval"]) == ("no change", 0.0, (0.0, 0.0))


def test_one_long_row_is_not_enough() -> None:
    """A row with nearly all tokens decides the value, and the test knows that it is a single row."""
    weights = [10_000.0] + [1.0] * 19
    entry = compare(result([2.0] * 20, "loss", weights=weights), result([3.0] + [2.0] * 19, "loss", weights=weights))
    assert entry["difference"] == pytest.approx(1.0, abs=0.01)
    assert entry["verdict"] == "unclear" and entry["p_value"] == 1.0


def test_graded_scores_take_the_graded_test() -> None:
    before, after = [0.0, 0.5] * 10, [0.25, 0.75] * 10
    entry = compare(result(before, "f1"), result(after, "f1"))
    assert entry["verdict"] == "better" and entry["difference_interval"] == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(
    ("metric", "before", "interval", "verdict"),
    [
        ("contains", 0.5, (-0.0499, 0.0499), "no change"),
        ("contains", 0.5, (-0.05, 0.01), "unclear"),
        ("contains", 0.5, (-0.01, 0.05), "unclear"),
        ("repetition", 0.1, (-0.04, 0.04), "no change"),
        ("loss", 2.0, (-0.0399, 0.0399), "no change"),
        ("loss", 2.0, (-0.041, 0.0), "unclear"),
        ("perplexity", 20.0, (-0.1, 0.39), "no change"),
        ("perplexity", 20.0, (-0.1, 0.41), "unclear"),
        ("loss", 0.0, (0.0, 0.0), "no change"),
        ("contains", 0.5, None, "unclear"),
        ("one of my own", 50.0, (-0.9, 0.9), "no change"),
        ("one of my own", 50.0, (-0.9, 1.1), "unclear"),
    ],
)
def test_no_change_is_said_only_where_none_that_matters_can_be(metric: str, before: float, interval: Any, verdict: str) -> None:
    """5 points of a share, a fiftieth of a loss or a perplexity."""
    assert verdict_of(Difference(0.0, interval, 1.0), metric, before, 100) == (verdict, "")


def test_what_another_run_needs_is_kept() -> None:
    """Items read back from `run.json` give the same value and difference, weights included."""
    before, after = ([2.0 + 0.1 * i + shift for i in range(8)] for shift in (0.0, 0.3))
    weights = [3.0 + i for i in range(8)]
    old, new = (result(scores, "perplexity", weights=weights) for scores in (before, after))
    entry = json.loads(json.dumps(compare(old, new)))
    items = recorded(entry)
    assert items is not None and value_of("perplexity", items) == pytest.approx(new.value)
    assert difference_of("perplexity", old.items, items) == difference_of("perplexity", old.items, new.items)
    for one in entry["items"]:
        del one["weight"]
    assert recorded(entry) is None, "a mean without weights is another one"
    assert recorded({**entry, "items": []}) is None


def test_noise_hides_a_difference() -> None:
    before, after = result([2.0] * 12, "loss"), result([2.01] * 12, "loss")
    assert compare(before, after)["verdict"] == "worse"
    assert compare(before, after, noise=0.001)["verdict"] == "worse"
    hidden = compare(before, after, noise=0.02)
    assert hidden["verdict"] == "no change" and "0.02" in hidden["note"]


def test_too_few_items_say_so() -> None:
    entry = compare(result([2.0] * 5, "loss"), result([9.0] * 5, "loss"))
    assert entry["verdict"] == "not measured" and "at least 6" in entry["note"]
    assert entry["difference"] == 7.0 and entry["difference_interval"] is None


def test_kept_counts_what_was_right() -> None:
    metrics = {
        "a": compare(result([1, 1, 1, 0], role="retention"), result([1, 0, 1, 1], role="retention")),
        "b": compare(result([1, 0], role="retention"), result([1, 0], role="retention")),
        "new": compare(result([1, 1]), result([0, 0])),
        "prose": compare(result([2.0], "loss", "retention"), result([2.0], "loss", "retention")),
        "nothing right": compare(result([0, 0], role="retention"), result([1, 1], role="retention")),
        "not run": compare(result([1, 1], role="retention"), None),
    }
    assert [entry["retained"] for entry in metrics.values()] == [2 / 3, 1.0, 0.0, None, None, None]
    assert share_retained(metrics) == 3 / 4
    assert share_retained({"new": metrics["new"], "prose": metrics["prose"]}) is None
    assert share_retained({}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"items": (Item("other", "", "", "", 0.0),)}, "different items"),
        ({"asked": "otherwise"}, "not asked in the same way"),
        ({"metric": "f1"}, "not asked in the same way"),
        ({"items": (Item("row0", "", "another answer", "", 0.0),)}, "expect different answers"),
    ],
)
def test_what_is_no_pair_is_refused(change: dict[str, Any], words: str) -> None:
    before = result([0])
    after = SetResult(**{**{name: getattr(before, name) for name in before.__dataclass_fields__}, **change})
    with pytest.raises(LuthierError, match=words):
        compare(before, after)


def test_noise_is_what_other_batches_change() -> None:
    """In bf16 sums round otherwise in other batches; in fp64 hardly. Answers of this model do not change at all."""
    tokenizer: Any = tiny_tokenizer()
    texts = [{"text": "The door of the mill is red. " * (1 + i % 5)} for i in range(20)]
    sets = [EvalSet("prose", read(texts), "loss"), EvalSet("asked", read([{"prompt": "x", "answer": "y"}]))]
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        tune = Tune(model, map_parts(model))
        found[dtype] = base_noise(tune, tokenizer, sets, measure(tune, tokenizer, sets), batch_tokens=100)
    assert found[torch.float64]["prose"] < 1e-12
    assert found[torch.bfloat16]["prose"] < 1e-2
    assert {noise["asked"] for noise in found.values()} == {0.0}


def test_a_tenth_of_the_answers_is_asked_for_again_and_all_where_one_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base was measured twice from end to end, which took as long as training did."""
    tokenizer: Any = tiny_tokenizer()
    model = tiny("llama")
    tune = Tune(model, map_parts(model))
    records = [{"id": str(i), "prompt": f"x{i}", "answer": "y"} for i in range(90)]
    sets = [
        EvalSet("asked", read(records), "contains", max_new_tokens=2),
        EvalSet("few", read(records[:6]), "contains", max_new_tokens=2),
        EvalSet("prose", read([{"text": "a b"}] * 3), "loss"),
    ]
    before = measure(tune, tokenizer, sets)
    asked: list[tuple[str, int]] = []

    def watched(tune: Any, tokenizer: Any, sets: Any, **options: Any) -> dict[str, SetResult]:
        asked.extend((one.name, len(one.used)) for one in sets)
        return measure(tune, tokenizer, sets, **options)

    monkeypatch.setattr(comparing, "measure", watched)
    assert base_noise(tune, tokenizer, sets, before) == {"asked": 0.0, "few": 0.0, "prose": pytest.approx(0.0, abs=1e-6)}
    assert asked == [("asked", 9), ("few", 6), ("prose", 3)]
    first = before["asked"].items[8]
    for changed in (first._replace(answer="another"), first._replace(score=1.0 - first.score)):
        asked.clear()
        items = (*before["asked"].items[:8], changed, *before["asked"].items[9:])
        value = sum(item.score for item in items) / 90
        found = base_noise(tune, tokenizer, sets, {**before, "asked": replace(before["asked"], items=items, value=value)})
        assert asked == [("asked", 9), ("asked", 90), ("few", 6), ("prose", 3)]
        assert found["asked"] == pytest.approx(abs(changed.score - first.score) / 90)
