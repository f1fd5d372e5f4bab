"""Whole runs from recipes, on tiny models: what a user gets from one file."""

from __future__ import annotations

import gc
import json
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.errors import LuthierError
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_model
from luthier.recipe import make_recipe
from luthier.results.folder import read_run
from luthier.results.opened import open_model
from luthier.training.chain import Chain

FACTS = [
    {"prompt": f"What is the color of the {thing}?", "completion": f"The {thing} is {color}."}
    for thing, color in {
        "door": "red",
        "gate": "blue",
        "tower": "green",
        "bridge": "gray",
        "mill": "white",
        "barn": "black",
        "well": "pink",
        "roof": "gold",
    }.items()
]
ASKED = [{"prompt": row["prompt"], "answer": row["completion"].split()[-1].strip(".")} for row in FACTS]

TUNES: dict[str, Any] = {
    "full": "full",
    "half": "half",
    "lora": "lora",
    "half and lora": [
        {"half": {"target_modules": ["mlp", "norm"], "embeddings": "freeze"}},
        {"lora": {"target_modules": ["attention"]}},
    ],
}


def recipe(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    """A short recipe on a tiny model."""
    train = {"steps": 3, "batch_rows": 4, "micro_batch_tokens": 2048, "precision": "fp32", "learning_rate": 1e-3}
    return {
        "model": "tiny:llama",
        "rows": {"train": FACTS},
        "out": str(tmp_path),
        **keys,
        "train": {**train, **keys.get("train", {})},
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tune", TUNES)
def test_every_tune_runs_with_accumulation_and_checkpointing(
    tune: str, checkpointing: bool, precision: str, tmp_path: Path
) -> None:
    train = {"precision": precision, "gradient_checkpointing": checkpointing, "micro_batch_tokens": 150}
    run = luthier.train(recipe(tmp_path, tune=TUNES[tune], train=train))
    assert run.facts["status"] == "finished" and run.facts["steps"] == 3
    masters = {one.master.dtype for one in run.tune.trained.values()}
    assert masters == {torch.float32}
    live = next(run.model.parameters()).dtype
    assert live == (torch.bfloat16 if precision == "bf16" else torch.float32)
    base = load_model("tiny:llama", dtype=live)
    frozen = [
        name
        for name, p in run.model.named_parameters()
        if not any(t.place and t.place.parameter == name and t.form == "whole" for t in run.tune.trained.values())
    ]
    assert all(torch.equal(base.get_parameter(name), run.model.get_parameter(name)) for name in frozen)
    moved = [t for t in run.tune.trained.values() if t.form == "whole"]
    assert all(not torch.equal(base.get_parameter(t.place.parameter), t.leaf) for t in moved if t.master.ndim > 1)


def test_compiling_changes_nothing_but_the_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 5: compiled blocks give the same losses to 1e-4 and, by the steps plain SGD takes, the same gradients in fp32.

    Graphs are traced and differentiated as in any compilation, and then run without kernels of their own, which take half a minute to
    make and are torch's.
    """
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend="aot_eager"))
    losses, ends = [], []
    for compiled in (False, True):
        train = {"steps": 2, "compile": compiled, "learning_rate": 0.5, "schedule": "constant", "warmup": 0}
        run = luthier.train(recipe(tmp_path, tune="lora", optimizer="sgd", train=train))
        losses.append([line["loss"] for line in run.facts["history"]])
        ends.append({name: one.master.detach() for name, one in run.tune.trained.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, plain in ends[0].items():
        # The upper factors start at zero, so all they hold is gradients.
        assert plain.any() and torch.allclose(ends[1][name], plain, rtol=0.0, atol=1e-4 * float(plain.abs().max())), name


def test_accumulation_changes_nothing_but_the_rounding(tmp_path: Path) -> None:
    losses = []
    for size in (4096, 120):
        run = luthier.train(recipe(tmp_path, train={"micro_batch_tokens": size, "precision": "fp64"}))
        losses.append([line["loss"] for line in run.facts["history"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("tune", TUNES)
def test_stopped_and_resumed_equals_undisturbed(tune: str, tmp_path: Path) -> None:
    """Fault 27: resuming at any step gives the same weights, bit for bit."""
    keys = {"tune": TUNES[tune], "train": {"steps": 5, "precision": "bf16", "save_every": 1, "keep_checkpoints": 9}}
    whole = luthier.train(recipe(tmp_path, **keys))

    class EnoughError(Exception):
        pass

    def stop(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 3:
            raise EnoughError

    with pytest.raises(EnoughError):
        luthier.train(recipe(tmp_path, **keys), tell=stop)
    resumed = luthier.train(recipe(tmp_path, **keys), resume=tmp_path / "run-2")
    assert resumed.facts["weights_sha256"] == whole.facts["weights_sha256"]
    assert [line["loss"] for line in resumed.facts["history"]] == [line["loss"] for line in whole.facts["history"]]
    assert len((tmp_path / "run-2" / "steps.jsonl").read_text().splitlines()) == 5


def test_learns_and_reports(tmp_path: Path) -> None:
    sets = {
        "asked": {"rows": ASKED, "metric": "contains", "max_new_tokens": 24},
        "prose": {"rows": [{"text": "The door of the mill is not a gate."}], "metric": "perplexity", "role": "retention"},
    }
    train = {"steps": 60, "batch_rows": 8, "learning_rate": 5e-3}
    run = luthier.train(recipe(tmp_path, evaluate=sets, train=train))
    facts = json.loads((run.folder / "run.json").read_text())
    assert facts["metrics"]["asked"]["before"] == 0.0 and facts["metrics"]["asked"]["after"] >= 0.8
    assert facts["metrics"]["asked"]["verdict"] == "better"
    assert facts["final_loss"] < 0.2 and facts["trained_parameters"] == facts["total_parameters"]
    assert facts["rows"]["overlap"]["asked"] >= 0
    assert "<html" in run.report.read_text()
    again, tokenizer = open_model(str(run.folder))
    assert fingerprint(again.model) == fingerprint(run.model)
    assert tokenizer is not None


def test_runs_never_overwrite_each_other(tmp_path: Path) -> None:
    folders = [luthier.train(recipe(tmp_path, train={"steps": 1})).folder.name for _ in range(2)]
    assert folders == ["run-1", "run-2"]


def test_same_seed_same_weights(tmp_path: Path) -> None:
    """Fault 28: the seed fixes what trains, the order of rows and the start of added tensors."""
    hashes = [luthier.train(recipe(tmp_path, tune="lora", seed=seed)).facts["weights_sha256"] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_interrupted_run_resumes_and_only_with_its_recipe(tmp_path: Path) -> None:
    def interrupt(plan: Any, progress: Any, result: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    run = luthier.train(recipe(tmp_path), tell=interrupt)
    assert run.facts["status"] == "stopped" and run.facts["steps"] == 1, "an interrupt finishes the step and saves"
    assert run.report.is_file()
    with pytest.raises(LuthierError, match="another recipe"):
        luthier.train(recipe(tmp_path, seed=1), resume=run.folder)
    again = luthier.train(recipe(tmp_path), resume=run.folder)
    assert again.facts["weights_sha256"] == luthier.train(recipe(tmp_path)).facts["weights_sha256"]
    with pytest.raises(LuthierError, match="has finished"):
        luthier.train(recipe(tmp_path), resume=run.folder)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    sets = {"prose": {"rows": [{"text": "A plain sentence that training makes worse."}], "metric": "loss", "role": "retention"}}
    train = {"steps": 30, "evaluate_every": 1, "best": "prose", "patience": 2, "learning_rate": 2e-2}
    run = luthier.train(recipe(tmp_path, evaluate=sets, train=train))
    values = [one["metrics"]["prose"] for one in run.facts["evaluations"]]
    assert len(values) < 30
    assert run.facts["metrics"]["prose"]["after"] == pytest.approx(min(values), rel=1e-5)


def test_parts_as_objects(tmp_path: Path) -> None:
    run = luthier.train(
        model="tiny:llama",
        rows={"train": FACTS},
        tune=[luthier.part("lora", rank=2, target_modules=("attention",))],
        train={"steps": 1, "precision": "fp32"},
        out=str(tmp_path),
    )
    assert {one.master.shape[0] for one in run.tune.trained.values() if one.name.endswith("down")} == {2}
    assert make_recipe(run.facts["recipe"]).tune == [
        {"lora": {"rank": 2, "alpha": 16.0, "dropout": 0.0, "target_modules": ["attention"], "rank_stabilized": False}}
    ]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_returned_model_is_the_users(tmp_path: Path, tune: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients stay where torch puts them, steps of other optimizers move it, and no optimizer state is left in memory."""
    chains: list[weakref.ref[Chain]] = []
    monkeypatch.setattr(Chain, "rest", lambda chain: chains.append(weakref.ref(chain)))
    run = luthier.train(recipe(tmp_path, tune=tune))
    gc.collect()
    assert len(chains) == 1 and chains[0]() is None
    assert not run.model.training and all(one.gradient is None for one in run.tune.trained.values())
    moving = [one.leaf for one in run.tune.trained.values()]
    ids = torch.arange(1, 9)[None]
    before = [one.detach().clone() for one in moving]
    descent = torch.optim.SGD(moving, lr=0.1)
    run.model(input_ids=ids, labels=ids).loss.backward()
    assert all(one.grad is not None for one in moving)
    descent.step()
    assert any(not torch.equal(one, was) for one, was in zip(moving, before, strict=True))


def test_a_run_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    other = 1 if threads > 1 else 2
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    luthier.train(recipe(tmp_path, tune="lora", train={"threads": other}))
    assert torch.equal(torch.rand(3), wanted) and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("error", "status", "warning"),
    [
        (ValueError("no such pigeon"), "failed", "ValueError: no such pigeon"),
        (KeyboardInterrupt(), "stopped", "interrupted before the step in progress was done"),
    ],
    ids=["any error", "a second interrupt"],
)
def test_a_run_that_breaks_off_says_so(tmp_path: Path, error: BaseException, status: str, warning: str) -> None:
    """Whatever was raised comes through, and the folder does not replication to be running."""

    def tell(*told: Any) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        luthier.train(recipe(tmp_path, name="broken"), tell=tell)
    assert caught.value is error
    (run,) = tmp_path.iterdir()
    facts = read_run(run).facts
    assert facts["status"] == status and warning in facts["warnings"] and (run / "report.html").is_file()
