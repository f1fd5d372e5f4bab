"""Whole runs on several processes: the same weights as on one, spread over them or not, and saved whole."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes

import luthier
from luthier.delta import Delta
from luthier.errors import LuthierError
from luthier.models.tiny import tiny
from luthier.results.folder import read_run
from luthier.training import checkpoint
from luthier.training.loop import Progress

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "red", "blue", "green", "birds", "flying", "over", "hill", "house")
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"tune": "lora"},
    "looks": {"tune": "lora", "token_weight": "sstoken"},
    "half": {"tune": "half"},
    # One row a step: one of two processes never has any.
    "lone": {"train": {"batch_rows": 1, "steps": 4}},
}
SPREAD = ("full", "lora", "looks", "lone")


def rows(count: int) -> list[dict[str, str]]:
    def words(i: int, length: int) -> str:
        return " ".join(WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(length))

    return [{"prompt": words(i, 2 + i % 7), "completion": " " + words(i + 1, 1 + i % 4)} for i in range(count)]


def recipe(name: str, out: Path, sharding: str = "none") -> dict[str, Any]:
    setting = SETTINGS[name]
    train = {
        "epochs": 1,
        "batch_tokens": 120,
        "micro_batch_tokens": 50,
        "precision": "fp64",
        "learning_rate": 0.01,
        "save_every": 2,
    }
    return {
        "name": f"{name}-{sharding}",
        "model": "tiny:llama",
        "seed": 3,
        "rows": {"train": rows(16)},
        **setting,
        "train": {**train, **setting.get("train", {}), "device": "cpu", "sharding": sharding},
        "evaluate": {"learnt": {"rows": rows(3), "metric": "perplexity"}},
        "out": str(out),
    }


def join(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def two_runs(rank: int, port: int, out: str) -> None:
    """Every setting, on two processes, spread over them and not; and one that begins on them and is stopped."""
    join(rank, 2, port)
    for name in SETTINGS:
        luthier.train(recipe(name, Path(out)))
    for name in SPREAD:
        luthier.train(recipe(name, Path(out), "full"))
    interrupted(recipe("full", Path(out), "full") | {"name": "begun-on-two"})
    luthier.train(recipe("full", Path(out)) | {"name": "begun-on-one"}, resume=f"{out}/begun-on-one-1")


def interrupted(data: dict[str, Any]) -> None:
    """A run that was asked to stop after its third step."""

    def ask(plan: Any, progress: Progress, result: Any) -> None:
        # Heard by the first process alone; all of them stop.
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert luthier.train(data, tell=ask).facts["status"] == "stopped"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one process and on two; two runs went from one to two and from two to one."""
    folder = tmp_path_factory.mktemp("runs")
    for name in SETTINGS:
        luthier.train(recipe(name, folder) | {"name": f"{name}-one"})
    interrupted(recipe("full", folder) | {"name": "begun-on-one"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(two_runs, (port, str(folder)), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    begun = recipe("full", folder) | {"name": "begun-on-two"}
    begun["train"]["sharding"] = "full"
    with pytest.raises(LuthierError, match="one process"):
        luthier.train(begun, resume=folder / "begun-on-two-1")
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    model = tiny("llama", dtype=torch.float64)
    Delta.load(run / "delta.safetensors").apply(model)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", [*SETTINGS, *(f"{name} spread" for name in SPREAD)])
def test_two_processes_end_where_one_does(out: Path, name: str) -> None:
    """Fault 2 and Fault 25: the same losses, evaluation and weights, and the saved file is whole."""
    setting, _, spread = name.partition(" ")
    one, two = out / f"{setting}-one-1", out / f"{setting}-{'full' if spread else 'none'}-1"
    first, second = read_run(one).facts, read_run(two).facts
    assert (first["processes"], second["processes"]) == (1, 2)
    for before, after in zip(first["history"], second["history"], strict=True):
        assert (before["tokens"], before["supervised_tokens"]) == (after["tokens"], after["supervised_tokens"])
        assert before["loss"] == pytest.approx(after["loss"], rel=1e-9)
    assert first["metrics"]["learnt"]["after"] == pytest.approx(second["metrics"]["learnt"]["after"], rel=1e-9)
    expected, found = weights(one), weights(two)
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-9), key
    assert second["delta"]["changed_share"] > 0


@pytest.mark.parametrize("name", SPREAD)
def test_fault_25_checkpoints_of_a_spread_model_are_whole(out: Path, name: str) -> None:
    """Fault 25: every tensor has its full shape and the numbers that one process saves."""
    last = max((out / f"{name}-one-1" / "checkpoints").glob("step-*")).name
    expected, _, _ = checkpoint.read(out / f"{name}-one-1" / "checkpoints" / last)
    found, _, _ = checkpoint.read(out / f"{name}-full-1" / "checkpoints" / last)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert value.shape == found[key].shape, key
        assert torch.allclose(value, found[key], rtol=0, atol=1e-9), key


def test_resuming_on_another_number_of_processes(out: Path) -> None:
    """From one process to two, the run ends where an undisturbed one does."""
    expected, found = weights(out / "full-one-1"), weights(out / "begun-on-one-1")
    assert read_run(out / "begun-on-one-1").facts["processes"] == 2
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=0, atol=1e-9), key


def test_only_the_first_process_writes(out: Path) -> None:
    """Two processes leave one run folder with one line a step."""
    assert sorted(path.name for path in out.glob("full-none-*")) == ["full-none-1"]
    lines = (out / "full-none-1" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


def test_accelerate_launches_the_command(tmp_path: Path) -> None:
    """`accelerate launch -m luthier train` runs on two processes and speaks once."""
    data = recipe("lora", tmp_path / "runs", "full")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, data["rows"]["train"])))
    data |= {"rows": {"train": str(tmp_path / "rows.jsonl")}, "evaluate": {}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "luthier", "train"]
    ended = subprocess.run(
        [*launch, str(tmp_path / "recipe.yaml"), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["processes"] == 2
