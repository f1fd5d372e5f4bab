"""The examples do what they say: the flat loop and the recipe take the same steps."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

import luthier
from luthier import registry
from luthier.errors import LuthierError

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_the_flat_loop_and_the_recipe_are_the_same_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flat = runpy.run_path(str(EXAMPLES / "flat_loop.py"))
    said = capsys.readouterr().out
    recipe = luthier.read_recipe(EXAMPLES / "same_run.yaml", [f"out={tmp_path}"])
    run = luthier.train(recipe)
    losses = {line["step"]: line["loss"] for line in run.facts["history"]}
    for step in (10, 20, 30, 40):
        told = next(line for line in said.splitlines() if line.startswith(f"step {step}:"))
        assert float(told.split()[2]) == pytest.approx(losses[step], abs=2e-3)
    ours = dict(run.model.named_parameters())
    gap = max(float((ours[name] - value).detach().abs().max()) for name, value in flat["model"].named_parameters())
    assert gap < 1e-4


def test_the_smallest_technique_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "token_weight"
    folder.mkdir()
    shutil.copy(EXAMPLES / "toy_technique.py", folder)
    monkeypatch.setenv("LUTHIER_METHODS", str(tmp_path))
    assert registry.find("toy_technique").kind == "token_weight"
    run = luthier.train(luthier.read_recipe(EXAMPLES / "same_run.yaml", [f"out={tmp_path}", "token_weight=toy_technique"]))
    plain = luthier.train(
        luthier.read_recipe(EXAMPLES / "same_run.yaml", [f"out={tmp_path}", "token_weight.toy_technique.floor=1.0"])
    )
    weighted, even = run.facts["history"][0], plain.facts["history"][0]
    assert weighted["nll"] == pytest.approx(even["nll"]) == pytest.approx(even["loss"])
    assert weighted["loss"] < weighted["nll"] and weighted["mean_weight"] < 1


def test_a_metric_of_your_own_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_METHODS", str(EXAMPLES / "my-methods"))
    run = luthier.train(luthier.read_recipe(EXAMPLES / "own_metric.yaml", [f"out={tmp_path}"]))
    polite, german = run.facts["metrics"]["polite"], run.facts["metrics"]["polite_in_german"]
    assert (polite["metric"], polite["before"], polite["after"], polite["verdict"]) == ("politeness", 0.0, 1.0, "better")
    assert german["after"] == 0.0 and german["options"] == {"words": ["bitte", "danke"]}
    monkeypatch.delenv("LUTHIER_METHODS")
    with pytest.raises(LuthierError, match="no metric `politeness`"):
        luthier.train(luthier.read_recipe(EXAMPLES / "own_metric.yaml", [f"out={tmp_path}"]))
