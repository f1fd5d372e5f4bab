"""Metrics of your own: functions and files, what they are given, what they may return, and that they cost no weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import luthier
from luthier import registry
from luthier.errors import LuthierError
from luthier.evaluate import own, scoring
from luthier.evaluate.catalogue import as_rows, one_metric
from luthier.evaluate.compare import compare
from luthier.evaluate.intervals import wilson
from luthier.evaluate.scoring import Scored, Scoring, ScoringError
from luthier.evaluate.sets import EvalSet, SetResult, measure
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.report.facts import sets_of
from luthier.rows.read import read
from luthier.runs.inputs import inputs_of
from luthier.runs.resume import recipe_file
from luthier.tune import Tune

ROWS: list[dict[str, Any]] = [
    {"id": f"r{number}", "prompt": f"Ask {number}.", "answer": "yes", "least": number, "tags": ["a"]} for number in range(6)
]
Say = Callable[..., None]


def politeness(answer: str, row: dict[str, Any], *, word: str = "please") -> float:
    """Share of words that
    are polite. More.

    Args:
        word: a polite one.
    """
    return answer.split().count(word) / len(answer.split())


def longer(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> Sequence[float]:
    return [len(answer) - row["least"] for answer, row in zip(answers, rows, strict=True)]


def one_set(metric: Any, rows: Sequence[dict[str, Any]] = ROWS) -> EvalSet:
    return EvalSet("held", read(rows), metric)


@cache
def tune() -> Tune:
    model = tiny("llama", layers=1)
    return Tune(model, map_parts(model))


def measured(metric: Any, rows: Sequence[dict[str, Any]] = ROWS) -> SetResult:
    return measure(tune(), tiny_tokenizer(), [one_set(metric, rows)])["held"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for metrics of your own, which the environment names."""
    (tmp_path / "mine" / "metric").mkdir(parents=True)
    monkeypatch.setenv("LUTHIER_METHODS", str(tmp_path / "mine"))
    yield tmp_path / "mine" / "metric"
    for name in [name for name in sys.modules if name.startswith("luthier_methods.metric.")]:
        del sys.modules[name]


def test_one_answer_at_a_time(answering: Say) -> None:
    answering(["please go", "go", "please please", "go", "go", "please"])
    result = measured(politeness)
    assert [item.score for item in result.items] == [0.5, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert (result.metric, result.n, result.higher_is_better, result.value) == ("politeness", 6, True, pytest.approx(2.5 / 6))
    assert result.interval is not None and result.interval[0] < result.value < result.interval[1]
    assert result.items[0].expected == "yes" and result.items[0].answer == "please go"


def test_all_answers_at_once(answering: Say) -> None:
    answering(["a", "bb", "ccc", "dddd", "eeeee", "fffffff"])
    assert [item.score for item in measured(longer).items] == [1, 1, 1, 1, 1, 2]
    assert [item.score for item in measured(lambda answers, rows: numpy.arange(6)).items] == [0, 1, 2, 3, 4, 5]
    assert [item.score for item in measured(lambda answers, rows: torch.ones(6)).items] == [1.0] * 6
    assert measured(lambda answers, rows: tuple(answer == "a" for answer in answers)).value == pytest.approx(1 / 6)


def test_a_row_is_all_that_stood_in_it_and_nobody_elses(answering: Say) -> None:
    seen = []

    def spoil(answer: str, row: dict[str, Any]) -> float:
        seen.append(json.loads(json.dumps(row)))
        row["tags"].append("b")
        row.clear()
        return 1.0

    answering(["a"] * 6)
    one = one_set(spoil)
    scores = [scoring.scored(one.chosen.scoring, ["a"] * 6, one.used, lambda text: None) for _ in range(2)]
    assert scores[0] == scores[1] == Scored([1.0] * 6)
    assert seen[0] == seen[6] == {"id": "r0", "prompt": "Ask 0.", "answer": ["yes"], "least": 0, "tags": ["a"]}


def test_right_or_wrong_is_tested_as_such(answering: Say) -> None:
    """Wilson's interval, McNemar's test, and the share of what was right that still is."""

    def right(answer: str, row: dict[str, Any]) -> bool:
        return answer == row["answer"][0]

    answering(["yes", "yes", "no", "no", "no", "no"], ["no", "yes", "yes", "yes", "yes", "yes"])
    before, after = measured(right), measured(right)
    entry = compare(before, after)
    assert before.interval == wilson(2, 6) and entry["after"] == pytest.approx(5 / 6)
    # One lost and four gained: 2 (C(5, 0) + C(5, 1)) / 2^5.
    assert entry["p_value"] == pytest.approx(12 / 32) and entry["retained"] == 0.5
    assert "judge" not in entry and "unscored" not in entry and "options" not in entry


def test_lower_may_be_better(answering: Say) -> None:
    @luthier.metric(higher_is_better=False)
    def words(answer: str, row: dict[str, Any]) -> int:
        return len(answer.split())

    answering(["a b c d e f g"] * 6, ["a"] * 6)
    before, after = measured(words), measured(words)
    entry = compare(before, after)
    assert (entry["before"], entry["after"], entry["verdict"]) == (7, 1, "better")
    assert entry["higher_is_better"] is False and entry["retained"] is None
    again = SetResult.from_json(json.loads(json.dumps(before.as_json())))
    assert again == before and not again.higher_is_better and compare(again, after) == entry


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda answer, row: None, ["`lambda` gives None for the answer 'a'", "row r0"]),
        (lambda answer, row: float("nan") if row["least"] == 2 else 1.0, ["gives nan", "row r2"]),
        (lambda answer, row: float("inf"), ["gives inf", "row r0"]),
        (lambda answer, row: "1.0", ["gives '1.0'", "row r0"]),
        (lambda answer, row: [1.0], ["gives [1.0]", "row r0"]),
        (lambda answer, row: 1 / row["least"], ["ZeroDivisionError", "row r0", "test_own_metrics.py, line"]),
        (lambda answers, rows: [1.0] * 5, ["5 numbers for 6 answers", "row r5", "the first without one"]),
        (lambda answers, rows: [1.0] * 7, ["7 numbers for 6 answers", "row r5"]),
        (lambda answers, rows: [], ["0 numbers for 6 answers", "row r0"]),
        (lambda answers, rows: [1.0, 1.0, None, 1.0, 1.0, 1.0], ["gives None", "row r2"]),
        (lambda answers, rows: 0.5, ["gives 0.5 for 6 answers", "one number for each"]),
        (lambda answers, rows: "111111", ["gives '111111'"]),
        (lambda answers, rows: dict.fromkeys(range(6), 1.0), ["for 6 answers"]),
        (lambda answers, rows: numpy.ones((6, 2)), ["gives [1.0, 1.0]", "row r0"]),
        (lambda answers, rows: rows[9], ["IndexError", "6 answers"]),
    ],
)
def test_what_is_no_score_is_refused_with_its_row(answering: Say, metric: Any, words: list[str]) -> None:
    answering(["a"] * 6)
    with pytest.raises(LuthierError) as caught:
        measured(metric)
    assert all(word in str(caught.value) for word in [*words, "evaluation set `held`"]), caught.value


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda: 1.0, ["`lambda` takes nothing", "def politeness(answer, row)"]),
        (lambda answer: 1.0, ["takes answer"]),
        (lambda row, answer: 1.0, ["takes row, answer"]),
        (lambda answer, row, more: 1.0, ["takes answer, row, more"]),
        ({"politeness": {}}, ["no metric `politeness`"]),
        ("politness", ["no metric `politness`", "luthier metrics"]),
        (print, ["`print` takes nothing"]),
    ],
)
def test_what_takes_something_else_is_refused_before_anything_runs(metric: Any, words: list[str]) -> None:
    with pytest.raises(LuthierError) as caught:
        one_set(metric)
    assert all(word in str(caught.value) for word in words), caught.value


def test_names_of_metrics_that_come_with_luthier_are_taken() -> None:
    def f1(answer: str, row: dict[str, Any]) -> float:
        return 1.0

    with pytest.raises(LuthierError, match="`f1` comes with luthier"):
        one_set(f1)


FILE = '''
"""A file."""
import luthier

@luthier.metric(higher_is_better=False)
def rudeness(answer, row, *, words: list[str] = ["no"], factor: float = 1.0):
    """Rude words of an answer. More."""
    return factor * sum(answer.count(word) for word in words)
'''


def test_a_file_is_found_by_its_name(folder: Path, answering: Say) -> None:
    (folder / "rudeness.py").write_text(FILE)
    answering(["no no", "no", "yes", "yes", "yes", "bah"])
    result = measured("rudeness")
    assert [item.score for item in result.items] == [2, 1, 0, 0, 0, 0] and not result.higher_is_better
    with_options = measured({"rudeness": {"words": ["bah", "no"], "factor": 2}})
    assert [item.score for item in with_options.items] == [4, 2, 0, 0, 0, 2]
    assert with_options.told["options"] == {"words": ["bah", "no"], "factor": 2} and with_options.asked != result.asked
    facts, _ = one_metric("rudeness")
    assert facts["meaning"] == "Rude words of an answer. More" and facts["higher_is_better"] is False
    assert facts["options"]["factor"]["default"] == 1.0
    with pytest.raises(LuthierError, match="no option `word`") as caught:
        one_set({"rudeness": {"word": ["a"]}})
    assert "words" in caught.value.fix
    with pytest.raises(LuthierError, match="the option `factor`"):
        one_set({"rudeness": {"factor": "much"}})
    with pytest.raises(LuthierError, match="`rudenes`") as caught:
        one_set("rudenes")
    assert "rudeness" in caught.value.fix


def test_no_file_is_run_that_nobody_asked_for(folder: Path, answering: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.py").write_text("raise RuntimeError('run')\n")
    (folder / "_helper.py").write_text("raise RuntimeError('run')\n")
    answering(["yes"] * 6)
    assert measured("contains").value == 1.0
    listed = {row["name"]: row for row in as_rows()}
    assert listed["broken"]["meaning"] == f"in {folder / 'broken.py'}" and "_helper" not in listed
    with pytest.raises(LuthierError, match="cannot be loaded as a metric: RuntimeError: run"):
        one_set("broken")
    (folder / "empty.py").write_text("")
    with pytest.raises(LuthierError, match="must define a function `empty`"):
        one_set("empty")
    monkeypatch.delenv("LUTHIER_METHODS")
    with pytest.raises(LuthierError, match="no metric `broken`"):
        one_set("broken")


def test_a_file_with_a_name_that_is_taken_is_no_silent_choice(folder: Path) -> None:
    (folder / "f1.py").write_text("def f1(answer, row): return 1\n")
    with pytest.raises(LuthierError, match="`f1` comes with luthier, and a file of your own") as caught:
        one_set("f1")
    assert str(folder / "f1.py") in caught.value.fix
    assert one_set("contains").chosen_metric == "contains"


def test_folders_without_any_kind_are_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("LUTHIER_METHODS", str(tmp_path))
    with pytest.raises(LuthierError, match="holds no folder of a kind"):
        registry.own_files(registry.METRIC)


def test_the_code_of_a_metric_is_told_apart(folder: Path) -> None:
    (folder / "rudeness.py").write_text(FILE)
    first = one_set("rudeness").chosen.code
    assert first == one_set({"rudeness": {"factor": 2}}).chosen.code != ""
    (folder / "rudeness.py").write_text(FILE + "\n# changed\n")
    assert one_set("rudeness").chosen.code != first
    assert own.identity(politeness) != own.identity(longer) and own.identity(politeness) == own.identity(politeness)
    assert len(own.identity(print)) == 64 and one_set("f1").chosen.code == ""


def test_only_the_first_process_scores_and_all_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        is_first = False

        def __init__(self, sent: Any) -> None:
            self.sent = sent

        def from_first(self, value: Any) -> Any:
            assert value == (None, None)
            return self.sent

    def called(answers: Any, rows: Any, say: Any) -> Scored:
        raise AssertionError("this process is not the first")

    rows = list(read(ROWS[:1]))
    monkeypatch.setattr("luthier.evaluate.scoring.World.current", lambda: Other((Scored([0.5]), None)))
    assert scoring.scored(Scoring(of_answers=called), ["a"], rows, lambda text: None) == Scored([0.5])
    monkeypatch.setattr("luthier.evaluate.scoring.World.current", lambda: Other((None, ("what", "where", "fix"))))
    with pytest.raises(ScoringError, match="what"):
        scoring.scored(Scoring(of_answers=called), ["a"], rows, lambda text: None)


def recipe(tmp_path: Path, metric: Any, **keys: Any) -> dict[str, Any]:
    train = {"steps": 2, "batch_rows": 2, "precision": "fp32", "learning_rate": 1e-3, **keys}
    rows = [{"prompt": row["prompt"], "completion": "Yes!"} for row in ROWS]
    sets = {"held": {"rows": ROWS, "metric": metric, "max_new_tokens": 2}}
    return {
        "model": "tiny:llama",
        "rows": {"train": rows},
        "train": train,
        "evaluate": sets,
        "out": str(tmp_path),
        "repeat_baseline": False,
    }


def test_a_run_with_a_function_in_python(tmp_path: Path, answering: Say) -> None:
    answering(["go"] * 6, ["please go"] * 6)
    run = luthier.train(recipe(tmp_path, politeness))
    entry = run.facts["metrics"]["held"]
    assert (entry["metric"], entry["before"], entry["after"], entry["verdict"]) == ("politeness", 0.0, 0.5, "better")
    assert run.facts["recipe"]["evaluate"]["held"]["metric"] == "<function given in Python>"
    assert [key for key in run.facts["inputs"] if "politeness" in key] == ["evaluate.held.metric: the code of politeness"]
    assert "politeness" in (run.folder / "report.html").read_text(encoding="utf-8")
    with pytest.raises(LuthierError, match=r"evaluate\.held\.metric.*was given in Python"):
        recipe_file(run)


def test_a_metric_that_fails_after_training_costs_no_weights(tmp_path: Path, answering: Say) -> None:
    """Nor in its middle, where it was to choose the best weights."""

    def fails(answer: str, row: dict[str, Any]) -> float:
        return 1 / (answer != "" and answer != "bad")

    answering(["a"] * 6, ["bad"] * 6, ["a"] * 6, ["bad"] * 6)
    run = luthier.train(recipe(tmp_path, fails, evaluate_every=1, best="held"))
    assert run.facts["status"] == "finished" and (run.folder / "delta.safetensors").is_file()
    entry = run.facts["metrics"]["held"]
    assert (entry["before"], entry["after"], entry["verdict"]) == (1.0, None, "not measured")
    assert [one["metrics"] for one in run.facts["evaluations"]] == [{}, {"held": 1.0}]
    told = [warning for warning in run.facts["warnings"] if "was not measured: the metric `fails` cannot score this" in warning]
    assert len(told) == 2 and all("row r0" in warning for warning in told)
    answering(["bad"] * 6)
    with pytest.raises(LuthierError, match="ZeroDivisionError"):
        luthier.train(recipe(tmp_path, fails))


def test_what_is_no_metric_is_refused_at_its_key(tmp_path: Path) -> None:
    for wrong in (3, ["f1"], True):
        with pytest.raises(LuthierError, match="a metric is its name") as caught:
            make_recipe(recipe(tmp_path, wrong))
        assert "evaluate.held.metric" in caught.value.where
    made = make_recipe(recipe(tmp_path, {"json_match": {"tolerance": 0.5}}))
    assert made.hash() != make_recipe(recipe(tmp_path, "json_match")).hash()


def test_the_plan_fingerprints_the_code(tmp_path: Path, folder: Path) -> None:
    (folder / "rudeness.py").write_text(FILE)
    asked = recipe(tmp_path, "rudeness")
    first = inputs_of(make_plan(make_recipe(asked)))
    (folder / "rudeness.py").write_text(FILE.replace("1.0", "2.0"))
    assert inputs_of(make_plan(make_recipe(asked))) != first


def test_the_page_counts_what_is_right_or_wrong(answering: Say) -> None:
    """Also without an accepted answer; where scores are graded, what stayed the same is neither right nor wrong."""

    def right(answer: str, row: dict[str, Any]) -> bool:
        return answer == "yes"

    rows = [{"prompt": f"Ask {number}."} for number in range(6)]
    answering(["yes", "no", "no", "no", "no", "no"], ["yes", "yes", "yes", "yes", "no", "no"])
    (shown,) = sets_of({"metrics": {"held": compare(measured(right, rows), measured(right, rows))}})
    assert shown.right == (1, 4) and [one.change for one in shown.samples] == ["right", *["learned"] * 3, *["wrong"] * 2]
    graded = {"yes": 1.0, "no": 0.0, "half": 0.5}
    answering(["yes", "no", "half", "half", "half", "half"], ["no", "yes", "half", "half", "half", "half"])
    metric = one_set(lambda answer, row: graded[answer], rows)
    both = [measure(tune(), tiny_tokenizer(), [metric])["held"] for _ in range(2)]
    entry = compare(*both)
    assert entry["retained"] is None, "where there are grades, 1 is one of them"
    (shown,) = sets_of({"metrics": {"held": entry}})
    assert shown.right is None and [one.change for one in shown.samples] == ["lost", "learned"] and shown.is_share
