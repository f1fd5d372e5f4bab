"""The estimate of memory against what a run measures, each in a fresh process; advice where memory will not do; two measured steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from luthier import machine
from luthier.cli import app
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.planning import estimate as planning
from luthier.planning.plan import make_plan, measure_plan
from luthier.recipe import make_recipe
from luthier.training.dryrun import Peak, peak_of
from tests.processor import multiplies_bf16

ROWS = [{"prompt": "abc " * (12 + i % 29), "completion": "xyz " * (30 + i % 31)} for i in range(40)]

TRAIN = """
import json, sys, torch
torch.set_num_threads(1)
import luthier
from luthier.runs import train as runs
told = []
runs.keep_what_changed = lambda plan, folder, say: told.append(plan.estimate.total_bytes) or {}
run = luthier.train(json.loads(sys.argv[1]))
print(json.dumps([told[0], run.facts["peak_memory_bytes"]]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of width 512: large enough that the tensors outweigh the interpreter."""
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama", layers=4, width=512, vocabulary=8192).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe(model: Path | str, out: Path, tune: str = "full", **train: Any) -> dict[str, Any]:
    settings = {"steps": 2, "batch_tokens": 2048, "micro_batch_tokens": 2048, "threads": 1, "device": "cpu", **train}
    return {"model": str(model), "rows": {"train": ROWS}, "tune": tune, "train": settings, "out": str(out)}


@pytest.mark.parametrize(
    ("tune", "train"),
    [
        ("full", {"precision": "fp32"}),
        ("half", {"precision": "bf16"}),
        ("lora", {"precision": "fp32"}),
        ("full", {"precision": "bf16", "gradient_checkpointing": True}),
    ],
)
def test_the_estimate_is_within_a_fifth_of_what_training_uses(
    model: Path, tmp_path: Path, tune: str, train: dict[str, Any]
) -> None:
    if not multiplies_bf16():
        # Minutes of it; the estimate counts bytes in either type.
        train = {**train, "precision": "fp32"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    data = json.dumps(recipe(model, tmp_path, tune, **train))
    done = subprocess.run([sys.executable, "-c", TRAIN, data], capture_output=True, text=True, env=environment, check=True)
    estimated, measured = json.loads(done.stdout.splitlines()[-1])
    assert abs(estimated / measured - 1) <= 0.2


@pytest.mark.usefixtures("counted")
def test_what_stands_is_counted_exactly_and_shapes_leave_nothing_behind(tmp_path: Path) -> None:
    plan = make_plan(make_recipe(recipe("tiny:llama", tmp_path, precision="fp32")))
    numbers = plan.total_parameters
    cost = plan.estimate
    assert (cost.weights, cost.masters, cost.kept, cost.gradients) == (4 * numbers, 0, 0, 4 * numbers)
    tensors = len(plan.engine.tune.trained)
    assert cost.optimizer == 2 * 4 * numbers + 4 * tensors
    assert cost.rough == ""
    assert all(one.gradient is None and one.leaf.grad is None for one in plan.engine.tune.trained.values())
    assert all(type(parameter) is torch.nn.Parameter for parameter in plan.model.parameters())


def test_activations_match_what_autograd_saves(tmp_path: Path) -> None:
    """A lone linear map keeps its input; the estimate's count is checked on one whose bytes are known."""
    from luthier.training.dryrun import ShapesOnly

    weight = torch.ones(32, 16, requires_grad=True)
    with ShapesOnly() as shapes:
        x = torch.zeros(8, 16)
        y = torch.nn.functional.linear(x, weight)
        assert shapes.live == 4 * (8 * 16 + 8 * 32)
        del y
        assert shapes.live == 4 * 8 * 16
    assert shapes.peak.total == 4 * (8 * 16 + 8 * 32)


@pytest.mark.usefixtures("counted")
def test_checkpointing_and_smaller_micro_batches_lower_the_estimate(tmp_path: Path) -> None:
    def activations(**train: Any) -> int:
        return make_plan(make_recipe(recipe("tiny:llama", tmp_path, precision="fp32", **train))).estimate.activations

    assert activations(gradient_checkpointing=True) < activations()
    assert activations(batch_tokens=512, micro_batch_tokens=512) < activations() / 2


@pytest.mark.usefixtures("counted")
def test_many_rows_are_estimated_from_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a micro-batch of hundreds of rows counted all of them, which took minutes, and again for every cut."""
    whole, counted = peak_of, []

    def few(engine: Any, batches: Any, now: Any) -> Any:
        counted.append(max(len(batch.row_ids) for batch in batches))
        return whole(engine, batches, now)

    monkeypatch.setattr(planning, "peak_of", few)
    keys = recipe("tiny:llama", tmp_path, precision="fp32", packing=True, batch_tokens=99999, micro_batch_tokens=99999)
    # One that is far longer than the others, whose attention alone weighs as much as that of many.
    short = [{"prompt": "abc " * (1 + i % 7), "completion": "xyz " * (1 + i % 5)} for i in range(40)]
    keys["rows"] = {"train": [*short, {"prompt": "abc", "completion": "xyz " * 110}]}
    plan = make_plan(make_recipe(keys))
    assert counted == [8, 16]
    batch = planning.find_largest(plan.feed).batch
    assert len(batch.row_ids) == 41
    exact = whole(plan.engine, [batch], plan.clock.at(0, 0.0))
    estimated = (plan.estimate.activations + plan.estimate.gradients) / (1 + planning.UNFIT)
    assert estimated == pytest.approx(exact.activations, rel=0.05)


def test_little_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of a tiny model spent half of its time on counting a few MiB, which the process differs by."""
    counts: list[object] = []
    monkeypatch.setattr(planning, "peak_of", lambda *given: counts.append(given) or Peak(9, 8, 1))
    little = make_plan(make_recipe(recipe("tiny:llama", tmp_path)))
    assert not counts and little.estimate.rough == planning.FEW and 2**20 < little.estimate.activations < planning.SMALL
    assert any(line.startswith("memory") and line.endswith("; activations roughly: too few to count)") for line in little.lines())
    monkeypatch.setattr(planning, "SMALL", 2**20)
    assert not make_plan(make_recipe(recipe("tiny:llama", tmp_path))).estimate.rough and counts


@pytest.mark.usefixtures("counted")
def test_it_says_what_to_cut_when_memory_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2**20)
    said: list[str] = []
    plan = make_plan(make_recipe(recipe("tiny:llama", tmp_path, precision="fp32")), said.append)
    assert "estimating memory and time" in said and any("will not fit" in one for one in said)
    (warning,) = [text for text in plan.warnings() if "MiB are available" in text]
    for change in (
        "train.micro_batch_tokens=",
        "train.gradient_checkpointing=true",
        "tune=half",
        "tune=lora",
        "train.precision=bf16",
    ):
        assert change in warning
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2**40)
    assert not any("available" in text for text in make_plan(make_recipe(recipe("tiny:llama", tmp_path))).warnings())


@pytest.mark.usefixtures("counted")
def test_a_cut_saves_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.planning.cuts import find_cuts

    plan = make_plan(make_recipe(recipe("tiny:llama", tmp_path, precision="fp32")))
    cuts = dict(find_cuts(plan.recipe, plan.engine, plan.parts, plan.feed, plan.dtype, plan.estimate, 0))
    assert list(cuts.values()) == sorted(cuts.values(), reverse=True)
    lora = make_plan(make_recipe(recipe("tiny:llama", tmp_path, "lora", precision="fp32"))).estimate
    assert cuts["tune=lora"] == sum(
        getattr(plan.estimate, name) - getattr(lora, name) for name in ("weights", "masters", "optimizer", "gradients")
    )
    checkpointed = make_plan(make_recipe(recipe("tiny:llama", tmp_path, precision="fp32", gradient_checkpointing=True))).estimate
    assert cuts["train.gradient_checkpointing=true"] == plan.estimate.activations - checkpointed.activations


def test_two_steps_are_measured_and_nothing_is_saved(tmp_path: Path) -> None:
    plan = make_plan(make_recipe(recipe("tiny:llama", tmp_path)))
    measured = measure_plan(plan)
    assert measured.peak_memory_bytes > 0 and measured.seconds_per_step > 0
    assert measured.seconds == pytest.approx(measured.seconds_per_step * plan.feed.tokens()[0] / measured.tokens)
    assert not list(tmp_path.iterdir())


def test_the_command_says_that_it_measured(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe("tiny:llama", tmp_path)))
    found = CliRunner().invoke(app, ["plan", str(file), "--measure", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["measured"]["how"] == "measured on two steps"
    assert "measured on two steps" in CliRunner().invoke(app, ["plan", str(file), "--measure"]).stdout
