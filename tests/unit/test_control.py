"""A recipe's control: found before anything trains, compared with at the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import luthier
from luthier.errors import LuthierError
from luthier.recipe import Recipe, make_recipe, read_recipe
from luthier.results.control import find_control
from luthier.results.folder import Run

ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four")]


def control_of(recipe: Recipe) -> Run | None:
    return find_control(recipe.baseline_run, recipe.out)


def data_of(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    """A recipe of one step, measured on three texts."""
    return {
        "model": "tiny:llama",
        "rows": {"train": ROWS},
        "train": {"steps": 1, "precision": "fp32"},
        "evaluate": {"prose": {"rows": [{"text": f"The {thing} is red."} for thing in ("door", "gate", "mill")]}},
        "repeat_baseline": False,
        "out": str(tmp_path / "runs"),
        **keys,
    }


def test_a_run_is_compared_with_the_run_it_names(tmp_path: Path) -> None:
    plain = luthier.train(data_of(tmp_path, name="plain"))
    run = luthier.train(data_of(tmp_path, name="tuned", tune="lora", baseline_run="plain-1"))
    facts = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["baseline_run"]
    assert facts["run"] == str(plain.folder) and facts["runs"] == ["plain-1", "tuned-1"]
    assert facts["recipe"] == {"tune": ["full", "lora"]}
    assert facts["metrics"]["prose"]["after"] == [one.facts["metrics"]["prose"]["after"] for one in (plain, run)]
    assert facts["metrics"]["prose"]["comparable"]
    page = (run.folder / "compare.html").read_text(encoding="utf-8")
    assert all(re.search(f"<td [^>]*>{words}</td>", page) for words in ("full", "lora")), "what differs is named"
    assert str(plain.folder) in run.report.read_text(encoding="utf-8")
    assert '<a href="compare.html">' in run.report.read_text(encoding="utf-8") and 'href="../plain-1/report.html"' in page
    told = run.facts
    assert told["learning_rate"] == 1e-3 and told["learning_rate_from"] == "lora's default" and told["ranks"] == {"lora": 8}
    rows = plain.facts["rows"]
    assert told["batch"]["rows"] == 4 and told["batch"]["tokens"] == told["tokens"] == rows["tokens"]
    assert len(rows["seen"]) == 3 and 0 < told["measuring_seconds"] < told["total_seconds"]
    first = rows["seen"][0]
    assert "".join(text for text, _ in first["pieces"]).count("Say one.") == 1 and first["labels"] > 0
    assert "".join(text for text, learned in first["pieces"] if learned).strip().startswith("one!")
    assert not (plain.folder / "compare.html").exists() and "baseline_run" not in plain.facts


def test_a_recipe_stands_for_its_newest_finished_run(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    data = data_of(tmp_path)
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    # A name that is found beside the recipe, not in the working folder.
    asks = tmp_path / "tuned.yaml"
    asks.write_text(yaml.safe_dump({**data, "baseline_run": "plain.yaml"}), encoding="utf-8")
    with pytest.raises(LuthierError, match="no finished run") as caught:
        control_of(read_recipe(asks))
    assert caught.value.where == "baseline_run" and "luthier train" in caught.value.fix
    runs = [luthier.train(file) for _ in range(2)]
    # Of the same name, but it did something else.
    luthier.train(read_recipe(file, ["train.steps=2"]))
    found = control_of(read_recipe(asks))
    assert found is not None and found.folder == runs[1].folder
    facts = {**runs[1].facts, "status": "stopped"}
    (runs[1].folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    found = control_of(read_recipe(asks))
    assert found is not None and found.folder == runs[0].folder


def test_a_control_that_cannot_serve_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "half-done-1"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "stopped"}), encoding="utf-8")
    with pytest.raises(LuthierError, match="has not finished") as caught:
        luthier.train(data_of(tmp_path, baseline_run="half-done-1"))
    assert caught.value.where == "baseline_run" and "--resume" in caught.value.fix
    with pytest.raises(LuthierError, match="there is no run `half-don-1`") as caught:
        luthier.train(data_of(tmp_path, baseline_run="half-don-1"))
    assert caught.value.where.startswith("baseline_run") and "half-done-1" in caught.value.fix
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["half-done-1"]


def test_without_a_control_nothing_is_looked_for() -> None:
    assert control_of(make_recipe({"model": "tiny:llama", "rows": {"train": ROWS}})) is None
