"""Faults that show only in whole runs: real order of rows, real schedules, several processes, fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.errors import LuthierError
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.runs.train import cost
from luthier.training.loop import Progress
from tests.toys.helpers import gradients, model_of, plain_gradients

ROWS = [{"id": f"row{i}", "prompt": "Say it.", "completion": "so " * (i + 1)} for i in range(7)]


def recipe(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    """A short recipe on a tiny model; 7 rows by 3 make two whole steps and a partial one."""
    train_keys = {"epochs": 1.0, "batch_rows": 3, "precision": "fp32", "learning_rate": 1e-3, **keys.pop("train", {})}
    return {"model": "tiny:llama", "rows": {"train": ROWS}, "out": str(tmp_path), "train": train_keys, **keys}


def test_every_step_of_an_epoch_is_the_mean_over_its_own_targets(engine: Any, now: Any, tmp_path: Path) -> None:
    """Fault 1: to 1e-6 in fp32, also the last step of an epoch, which has fewer rows than the others."""
    small, large = (make_plan(make_recipe(recipe(tmp_path, train={"micro_batch_tokens": size}))).feed for size in (70, 10**6))
    sizes = []
    for step in range(small.total()):
        (_, micro_batches), (_, (whole,)) = small.at(step), large.at(step)
        sizes.append((len(whole.row_ids), len(micro_batches)))
        model = model_of().float()
        expected = plain_gradients(model, whole)
        found = gradients(engine("full", model=model, dtype=torch.float32), micro_batches, now)
        assert max(float((found[f"full/{name}"] - one).abs().max()) for name, one in expected.items()) < 1e-6
    assert [rows for rows, _ in sizes] == [3, 3, 1] and max(parts for _, parts in sizes) > 1


def test_a_run_that_overflows_saves_nothing_from_then_on(tmp_path: Path) -> None:
    """Fault 4: the step after an overflow is not taken, no checkpoint is written from it, and the run says it failed."""
    keys = {"learning_rate": 1e38, "schedule": "constant", "warmup": 0, "save_every": 1, "keep_checkpoints": 9}
    with pytest.raises(LuthierError, match="not a finite number"):
        luthier.train(recipe(tmp_path, train=keys))
    folder = tmp_path / "run-1"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1"]
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "failed" and "not a finite number" in facts["warnings"][-1] and len(facts["history"]) == 1
    assert (folder / "report.html").is_file() and not (folder / "delta.safetensors").exists()


def test_steps_without_a_target_are_warned_of_once(tmp_path: Path) -> None:
    """Fault 4: one warning for all such steps, not one each and not none."""
    plan = make_plan(make_recipe(recipe(tmp_path)))
    quiet, empty = (cost(plan, Progress(step=3, empty_steps=number))["warnings"] for number in (0, 2))
    assert [text for text in empty if text not in quiet] == ["2 steps had no target and were not taken"]


@pytest.mark.parametrize(("options", "scale"), [({"rank": 4, "alpha": 12.0}, "3"), ({"rank": 16, "rank_stabilized": True}, "4")])
def test_the_effective_scale_is_printed(tmp_path: Path, options: dict[str, Any], scale: str) -> None:
    """Fault 16: the plan names the number that deltas are multiplied with, not rank and alpha alone."""
    lines = make_plan(make_recipe(recipe(tmp_path, tune={"lora": options}))).lines()
    assert f"lora adds its deltas times {scale}" in [line.strip() for line in lines]


def test_the_seed_alone_fixes_the_start_the_order_and_dropout(tmp_path: Path) -> None:
    """Fault 28: the start of adapters, the order of rows and dropout follow from the seed, whatever ran before."""

    def start(seed: int, before: int) -> Any:
        torch.manual_seed(before)
        plan = make_plan(make_recipe(recipe(tmp_path, tune="lora", seed=seed)))
        order = [batch.row_ids for step in range(3) for batch in plan.feed.at(step)[1]]
        return plan.fingerprint, order, {name: one.master.detach().tolist() for name, one in plan.engine.tune.trained.items()}

    (model, order, factors), again, other = start(0, before=1), start(0, before=2), start(1, before=1)
    assert (model, order, factors) == again
    assert order != other[1] and factors != other[2]

    def ended(dropout: float, before: int) -> Any:
        torch.manual_seed(before)
        return luthier.train(recipe(tmp_path, tune={"lora": {"dropout": dropout}})).facts["weights_sha256"]

    assert ended(0.5, before=1) == ended(0.5, before=2) != ended(0.0, before=1)


SCRIPT = """
import sys, torch, luthier
from luthier.runs.chat import Chat
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[2]))
run = luthier.train(model="tiny:llama", rows={"train": ROWS}, tune={"lora": {"dropout": 0.3}}, out=sys.argv[1],
                    train={"steps": 3, "batch_rows": 3, "precision": "fp32", "learning_rate": 1e-2})
talk = Chat(str(run.folder), temperature=1.0, max_new_tokens=12, seed=5)
print(run.facts["weights_sha256"], ascii(talk.ask("Say it.")))
"""


def test_two_interpreters_with_one_seed_end_in_the_same_numbers(tmp_path: Path) -> None:
    """Fault 28: the same weights and the same drawn answer in two processes, whose hashes of texts differ."""
    script = f"ROWS = {ROWS!r}\n{SCRIPT}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / number), number],
            env={**os.environ, "PYTHONHASHSEED": number, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in ("1", "2")
    ]
    said = [one.communicate(timeout=120)[0] for one in running]
    assert [one.returncode for one in running] == [0, 0]
    assert said[0] == said[1] and len(said[0].split()[0]) == 64


def test_steps_and_epochs_that_mean_the_same_are_the_same(tmp_path: Path) -> None:
    """Fault 29: the plan's rates and rows are equal for two epochs and for as many steps; warm-up reaches the peak."""
    plans = [
        make_plan(make_recipe(recipe(tmp_path, train={**keys, "warmup": 2})))
        for keys in ({"epochs": 2.0}, {"steps": 6, "epochs": 99.0})
    ]
    seen = [
        [(plan.clock.at(step, 0.0).learning_rate, [batch.row_ids for batch in plan.feed.at(step)[1]]) for step in range(6)]
        for plan in plans
    ]
    assert [plan.clock.steps for plan in plans] == [6, 6] and seen[0] == seen[1]
    assert [rate for rate, _ in seen[0]].index(1e-3) == 1 and max(rate for rate, _ in seen[0]) == 1e-3


def test_parts_that_cannot_go_together_are_both_named(tmp_path: Path) -> None:
    """Fault 32: the error names the one and the other, the place and a way out."""
    with pytest.raises(LuthierError) as caught:
        make_plan(make_recipe(recipe(tmp_path, gradient_estimator="per_layer", optimizer=["clip", "adamw"])))
    assert "`clip`" in caught.value.what and "`per_layer`" in caught.value.what
    assert caught.value.where == "gradient_estimator" and "backprop" in caught.value.fix and "`clip`" in caught.value.fix
