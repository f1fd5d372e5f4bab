"""Evaluation sets on an endpoint: what is sent, what is scored, and what is refused before anything is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.recipe import make_recipe
from luthier.runs.measure import evaluate_endpoint
from tests.stub_endpoint import KEY, Stub, refused, said

ROWS = [{"id": f"r{number}", "prompt": f"What is {number} and 1?", "answer": str(number + 1)} for number in range(8)]


def recipe_of(**sets: Any) -> dict[str, Any]:
    return {"model": "tiny:llama", "rows": {"train": [{"text": "a b"}]}, "evaluate": sets}


def adds(body: dict[str, Any]) -> str:
    """Right but for 3 and 1."""
    number = int(body["messages"][-1]["content"].split()[2])
    return "five" if number == 3 else f"It is {number + 1}."


def reached(stub: Stub, **sets: Any) -> Any:
    return evaluate_endpoint(f"endpoint:{stub.url}", "mine", make_recipe(recipe_of(**sets)))


def test_answers_of_an_endpoint_are_scored_as_those_of_a_model(stub: Stub) -> None:
    stub.answer, stub.key = adds, KEY
    system = {**ROWS[0], "id": "s", "system": "Be brief."}
    found = reached(
        stub,
        sums={"rows": [*ROWS, system], "metric": "last_number", "max_new_tokens": 9},
        words={"rows": ROWS[:1], "role": "retention"},
    )
    sums = found["sums"]
    assert [item.score for item in sums.items] == [1, 1, 1, 0, 1, 1, 1, 1, 1] and sums.value == pytest.approx(8 / 9)
    assert (sums.n, sums.metric, sums.items[3].answer, sums.items[3].expected) == (9, "last_number", "five", "4")
    assert sums.interval is not None and sums.interval[0] < 8 / 9 < sums.interval[1]
    bodies = {body["messages"][-1]["content"]: body for body in stub.bodies}
    assert bodies["What is 5 and 1?"]["messages"] == [{"role": "user", "content": "What is 5 and 1?"}]
    assert [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 0 and 1?"}] in [
        one["messages"] for one in stub.bodies
    ]
    assert {(body["model"], body["temperature"]) for body in stub.bodies} == {("mine", 0.0)}
    assert {body["max_tokens"] for body in stub.bodies} == {9, 48}
    assert (
        sums.told["served"]["requests"] == 9 and sums.told["served"]["models"] == ["stub-2026"] and sums.told["served"]["cut"] == 0
    )
    assert found["words"].metric == "contains" and found["words"].role == "retention"
    assert not any("accepted" in json.dumps(body) or '"4"' in json.dumps(body) for body in stub.bodies)
    # What is served may have changed, so it is asked again.
    stub.answer = lambda body: "no"
    assert reached(stub, words={"rows": ROWS[:1]})["words"].value == 0.0


def test_an_answer_that_was_cut_is_counted(stub: Stub) -> None:
    cut = said("1 and so on")
    cut.body["choices"][0]["finish_reason"] = "length"
    stub.answer = lambda body: cut
    assert reached(stub, one={"rows": ROWS[:2]})["one"].told["served"]["cut"] == 2


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (
            {"rows": [{"prompt": "a", "completion": "b"}], "metric": "loss"},
            r"(?s)`loss` needs more than answers.*luthier eval MODEL",
        ),
        ({"rows": [{"prompt": "a", "choices": ["b", "c"], "answer": 0}]}, "`choice` needs more than answers"),
        ({"rows": [{"text": "a b"}], "metric": "repetition"}, "a text to go on from"),
        ({"rows": [{"prompt": "a", "answer": "b", "tools": [{"name": "f"}]}], "metric": "exact_match"}, "the row has tools"),
    ],
)
def test_what_an_endpoint_cannot_tell_is_refused_before_anything_is_sent(stub: Stub, one: dict[str, Any], said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        reached(stub, fine={"rows": ROWS[:1]}, bad=one)
    assert not stub.bodies


def test_a_task_of_the_harness_is_refused(stub: Stub, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n')
    (tmp_path / "t.yaml").write_text(
        f"task: t\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list:\n  - metric: exact_match\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        patch.setattr("luthier.evaluate.harness._manager_of", lambda module: module.tasks.TaskManager(include_defaults=False))
        with pytest.raises(LuthierError, match="tasks of the evaluation harness are asked of a model in memory"):
            reached(stub, bench={"tasks": ["t"], "include_path": str(tmp_path)})
    assert not stub.bodies


def test_the_command_line_names_the_endpoint_its_model_and_its_key(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.answer, stub.key = adds, "sk-other"
    monkeypatch.setenv("MY_KEY", "sk-other")
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(sums={"rows": "sums.jsonl", "metric": "last_number"})))
    command = ["eval", f"endpoint:{stub.url}", str(tmp_path / "recipe.yaml")]
    result = CliRunner().invoke(app, [*command, "--model-name", "mine", "--api-key-env", "MY_KEY", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["metrics"]["sums"]
    assert found["value"] == pytest.approx(7 / 8) and found["told"]["served"]["model"] == "mine" and "sk-other" not in result.output
    plain = CliRunner().invoke(app, [*command, "--model-name", "mine", "--api-key-env", "MY_KEY"])
    assert "87" in plain.output and "last number" in plain.output
    for words, told in (
        (command, "--model-name NAME"),
        ([*command[:2], "--model-name", "mine"], "evaluation sets of a recipe"),
        ([*command[:2], "--tasks", "gsm8k", "--model-name", "mine"], "evaluation sets of a recipe"),
        ([*command, "--model-name", "mine"], "Incorrect API key"),
    ):
        wrong = CliRunner().invoke(app, words)
        assert wrong.exit_code == 2 and told in " ".join(wrong.output.replace("│", " ").split()), wrong.output


def test_a_refusal_of_the_endpoint_is_told(stub: Stub) -> None:
    stub.failures = [refused(404, "no such model")] * 20
    with pytest.raises(LuthierError, match="no such model"):
        reached(stub, one={"rows": ROWS})
