"""The command line: what people and scripts see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from luthier.cli import app

ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four")]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe file beside its rows."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = [{"prompt": row["prompt"], "answer": row["completion"].strip("!")} for row in ROWS]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: tiny:llama\n"
        "rows: {train: rows.jsonl}\n"
        "train: {steps: 2, batch_rows: 4, precision: fp32}\n"
        "evaluate: {asked: {rows: asked.jsonl, max_new_tokens: 4}}\n"
        f"out: {tmp_path / 'runs'}\n"
    )
    return path


def call(*words: object) -> Result:
    """Call the command line."""
    return CliRunner().invoke(app, [str(word) for word in words])


def facts(result: Result, code: int = 0) -> Any:
    """The one JSON document on standard output."""
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_train_json_holds_what_scripts_need(recipe: Path) -> None:
    found = facts(call("train", recipe, "tune=half", "--json"))
    wanted = (
        "run metrics retained trained_parameters total_parameters seconds tokens supervised_tokens peak_memory_bytes final_loss "
    )
    wanted += "weights_sha256"
    assert set(wanted.split()) <= found.keys()
    assert found["metrics"]["asked"].keys() >= {"before", "after", "n"} and found["metrics"]["asked"]["n"] == 4
    assert 0 < found["trained_parameters"] < found["total_parameters"]
    assert found["retained"] is None, "no set is on the side of what should be kept: not measured"
    assert Path(found["run"], "report.html").is_file()


def test_every_other_command_after_a_run(recipe: Path, tmp_path: Path) -> None:
    run = facts(call("train", recipe, "tune=lora", "--json"))["run"]
    out = tmp_path / "runs"
    assert [one["name"] for one in facts(call("runs", "--folder", out, "--json"))] == ["small"]
    assert facts(call("eval", run, recipe, "--json"))["metrics"]["asked"]["n"] == 4
    assert facts(call("chat", run, "--prompt", "Say one.", "--max-new-tokens", 3, "--base", "--json")).keys() >= {"answer", "base"}
    assert facts(call("compare", run, run, "--json"))
    assert Path(facts(call("export", run, tmp_path / "plain", "--json"))["folder"], "config.json").is_file()
    exported = facts(call("export", run, tmp_path / "peft", "--as", "peft", "--json"))
    assert Path(exported["folder"], "adapter_config.json").is_file()
    assert "exists already" in facts(call("export", run, tmp_path / "peft", "--json"), code=2)["error"]
    for words in (("runs", "--folder", out), ("compare", run, run), ("eval", run, recipe)):
        result = call(*words)
        assert result.exit_code == 0 and result.stdout.strip(), result.output


def test_plan_trains_nothing_and_says_what_would(recipe: Path, tmp_path: Path) -> None:
    found = facts(call("plan", recipe, "--json"))
    assert found["steps"] == 2 and found["trained_share"] == 1.0 and found["estimated_peak_memory_bytes"] > 0
    shown = call("plan", recipe)
    assert "tiny:llama" in shown.stdout and "4 rows" in shown.stdout
    assert not (tmp_path / "runs").exists()


def test_techniques_and_papers() -> None:
    found = {one["name"]: one for one in facts(call("techniques", "--json"))}
    assert {"full", "half", "lora"} <= found.keys()
    assert found["half"]["row"] == 8 and found["half"]["paper"] == "arXiv:2404.18466"
    assert all({"name", "kind", "row", "paper", "needs", "replication", "verdict"} <= one.keys() for one in found.values())
    one = facts(call("techniques", "half", "--json"))
    assert one["options"]["share"]["default"] == 0.5
    papers = facts(call("papers", "--json"))
    assert len(papers) == 270
    assert [one["techniques"] for one in papers if one["number"] == 8] == [["half"]]
    assert all(one["paper"] == "" for one in papers if not one["techniques"]), "unconfirmed numbers are not shown"
    assert call("techniques", "half").exit_code == 0 and call("papers", "--done").exit_code == 0


def test_rows_look(recipe: Path, tmp_path: Path) -> None:
    found = facts(call("rows", "look", tmp_path / "rows.jsonl", "--model", "tiny:llama", "--json"))
    assert json.dumps(found).count("assistant") >= 1
    assert "three!" in call("rows", "look", tmp_path / "rows.jsonl", "--model", "tiny:llama").stdout
    cut = facts(call("rows", "look", tmp_path / "rows.jsonl", "max_length=12", "too_long=left", "--model", "tiny:llama", "--json"))
    assert cut["tokens"] < found["tokens"] and cut["too_long"]
    refused = call("rows", "look", tmp_path / "rows.jsonl", "max_token=12", "--model", "tiny:llama")
    assert refused.exit_code == 2 and "max_length" in refused.stderr


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["tune=harf"], "half"),
        (["trian.epochs=2"], "train"),
        (["train.epohcs=2"], "epochs"),
        (["tune.lora.rnk=4"], "rank"),
        (["train.precision=fp99"], ""),
        (["epochs"], "train.epochs=2"),
        (["optimizer=clip"], "adamw"),
        (["gradient_estimator=per_layer"], "backprop"),
        (["train.best=nothing"], "asked"),
        (["model=tiny:lama"], "llama"),
        (["rows.train=missing.jsonl"], ""),
    ],
)
def test_mistakes_are_named_with_a_remedy(recipe: Path, words: list[str], fix: str, tmp_path: Path) -> None:
    """Fault 32: an unknown key names the nearest one; parts that cannot go together are both named."""
    told = facts(call("train", recipe, *words, "--json"), code=2)
    assert told["error"] and told["fix"] is not None and fix in told["fix"] + told["error"]
    assert not (tmp_path / "runs").exists(), "nothing was started"
    shown = call("train", recipe, *words)
    assert shown.exit_code == 2 and "Traceback" not in shown.output


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: tiny:llama\nrows: {train: [\n")
    assert "broken.yaml:" in facts(call("plan", path, "--json"), code=2)["where"]


def test_help_teaches() -> None:
    for words in ((), ("train",), ("plan",), ("eval",), ("chat",), ("rows", "look"), ("export",), ("compare",)):
        shown = call(*words, "--help")
        assert shown.exit_code == 0 and "Usage" in shown.stdout
