"""`luthier metrics`: what there is on one line each, and one metric whole with an example that holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from luthier.cli import app
from luthier.evaluate.catalogue import as_rows, described, example
from luthier.evaluate.judge import judge
from luthier.evaluate.metrics import METRICS
from luthier.evaluate.sets import EvalSet
from luthier.rows.read import read


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["metrics", *words])


def test_every_metric_has_one_line_under_what_it_needs() -> None:
    lines = call().stdout.splitlines()
    assert max(map(len, lines)) <= 80
    heads = [line for line in lines if line and not line.startswith(" ")]
    assert heads == ["generated text", "choices", "likelihood", "a head"]
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [row["name"] for row in as_rows()]
    under: dict[str, str] = {}
    for line in lines:
        group = line if line in heads else group if line else ""  # noqa: F821
        under |= {line.split()[0]: group} if line.startswith("  ") else {}
    ways = {"generation": heads[0], "choice": heads[1], "pair": heads[1], "likelihood": heads[2]}
    assert under == {name: ways.get(one.needs, heads[3]) for name, one in METRICS.items()}
    assert any(line.endswith("\u2026") for line in lines), "what is cut says so"
    assert "  equal              share of answers that are an accepted one letter for letter" in lines


def test_json_tells_all_of_it() -> None:
    found = {row["name"]: row for row in json.loads(call("--json").stdout)}
    assert found.keys() == METRICS.keys() and all(found[name]["meaning"] == one.meaning for name, one in METRICS.items())
    assert found["json_match"]["options"] == ["required", "tolerance"] and found["equal"]["options"] == []
    assert found["loss"]["higher_is_better"] is False and found["repetition"]["rows"] == "a `prompt`"
    one = json.loads(call("judge", "--json").stdout)
    assert one["options"]["scale"]["default"] == [1.0, 10.0] and "default" not in one["options"]["rubric"]
    assert one["options"]["api_key_env"]["meaning"].startswith("the environment variable with the key")
    assert "Zheng et al., 2023" in one["formula"] and "Args" not in one["formula"]


@pytest.mark.parametrize("name", METRICS)
def test_examples_can_be_measured(name: str) -> None:
    shown = example(name, METRICS[name])
    made = EvalSet("held", read([shown["row"]]), shown["metric"])
    assert made.chosen_metric == name


def test_one_metric_whole() -> None:
    said = call("json-match").stdout
    told, recipe = said.split("\nexample\n")
    assert "accepted answer" in told and "tolerance" in told and "how far a number may be" in told and "higher" in told
    metric = yaml.safe_load(recipe.split("\nwith lines")[0])["evaluate"]["held_out"]["metric"]
    assert metric == {"json_match": {"required": ["name"], "tolerance": 0.5}}
    assert "2 TP / (2 TP + FP + FN)" in call("macro_f1").stdout and "lower" in call("perplexity").stdout
    assert "Raises" not in call("auroc").stdout and "Args" not in call("repetition").stdout
    wrong = call("rouge_3")
    assert wrong.exit_code == 2 and "rouge_1" in wrong.stderr


def test_every_option_is_described() -> None:
    assert all(described(judge).values())
    for name, one in METRICS.items():
        if one.make is not None:
            options = json.loads(call(name, "--json").stdout)["options"]
            assert options and all(option["meaning"] for option in options.values()), name
    assert described(None) == {} and described(test_every_option_is_described) == {}


def test_metrics_of_your_own_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metric").mkdir()
    file = tmp_path / "metric" / "terse.py"
    file.write_text(
        'def terse(answer, row, *, most: int = 9):\n    """Short ones.\n\n    Args:\n        most: letters.\n    """\n    return 1\n'
    )
    monkeypatch.setenv("LUTHIER_METHODS", str(tmp_path))
    assert "your own, from generated text\n  terse  in " in call().stdout
    one = json.loads(call("terse", "--json").stdout)
    assert one["options"] == {"most": {"default": 9, "title": "Most", "type": "integer", "meaning": "letters."}}
    assert one["meaning"] == "Short ones" and one["example"]["metric"] == "terse" and one["higher_is_better"] is True
