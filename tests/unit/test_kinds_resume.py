"""Killed at any step and resumed from a checkpoint by a fresh engine: the same weights and state, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now, Place, Select, Selective
from luthier.registry import Part, kinds_under
from luthier.training.checkpoint import FACTS, TENSORS, latest, prune, read, restore, save
from tests.conftest import split
from tests.toys.helpers import model_of, rows_of_eight, toys  # noqa: F401

STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"tune": "full", "callbacks": "average"},
    "full in bf16": {"tune": "full", "dtype": torch.bfloat16},
    "full without masters": {"tune": "full", "dtype": torch.bfloat16, "masters": "none"},
    "half": {"tune": "half", "optimizer": ["clip", {"adamw": {"weight_decay": 0.1}}]},
    "dropout": {"tune": {"lora": {"dropout": 0.2}}},
    "entries": {"tune": "some_entries"},
    "entries that keep": {"tune": "keep_entries", "keep_base": True},
    "entries that keep, in bf16": {"tune": "keep_entries", "dtype": torch.bfloat16},
    "growing": {"tune": "growing", "callbacks": "average"},
    "subtracted": {"tune": "svd_start"},
    "own head": {"tune": "some_rows", "objective": ["cross_entropy", "extra_head"]},
    "penalty": {"tune": "some_cols", "objective": ["cross_entropy", {"pull_to_start": {"weight": 1.0}}]},
    "masked inputs": {"objective": ["cross_entropy", {"masked_thought": {"warmup": 0.2}}, "drop_tokens"]},
    "weights of tasks by losses measured between steps": {
        "token_weight": {"convergence_balance": {"validation_source": "other", "every": 2, "window": 2}}
    },
    "noise": {"objective": [{"noisefit": {"layers": 1}}, "neftune"]},
    "transposed rows": {"tune": "some_rows", "architecture": "gpt2"},
    "per layer": {"tune": "full", "gradient_estimator": "per_layer"},
    "zeroth order": {"tune": "half", "gradient_estimator": "zeroth_order", "optimizer": "sgd"},
    "momentum": {"tune": "full", "optimizer": ["low_rank_sgd", {"sgd": {"momentum": 0.9}}]},
    "in turns": {"tune": "full", "freeze": "in_turns"},
    "in turns without moments, in bf16": {"tune": "full", "freeze": "in_turns", "optimizer": "sgd", "dtype": torch.bfloat16},
    "in turns, forgetting, in bf16": {
        "tune": "full",
        "freeze": {"in_turns": {"forget": True, "every": 2}},
        "dtype": torch.bfloat16,
    },
    "phases of whole and flat": {"tune": {"lt_sft": {"share": 0.15}}},
    "phases of edits": {"tune": {"lofit": {"share": 0.15}}},
    "phases of a prompt": {"tune": [{"promot": {"share": 0.15}}, "half"]},
    **{
        f"technique {name}": {"tune": name}
        for kind in kinds_under("tune")
        for name in registry.names(kind)
        # One whose objective reads labels needs other rows; it goes through the loop itself elsewhere.
        if name not in ("full", "half", "ptec")
    },
    "many": {"tune": ["some_entries", "lora", "plain_prefix", "plain_prompt", "bottleneck"], "callbacks": "average"},
}


def build(engine: Any, architecture: str = "llama", **setting: Any) -> Any:
    run = engine(**{"optimizer": "adamw", **setting, "model": model_of(architecture)})
    run.tune.model.train()
    return run


def go(run: Any, now: Now, first: int, last: int) -> None:
    for i in range(first, last):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))


def everything(run: Any) -> dict[str, Any]:
    """All numbers a run has."""
    found: dict[str, Any] = {f"live {name}": one.data for name, one in run.tune.model.named_parameters()}
    found |= {f"master {name}": one.master.detach() for name, one in run.tune.trained.items()}
    found |= {f"index {name}": one.index for name, one in run.tune.trained.items() if one.index is not None}
    found |= {f"start {name}": one.start for name, one in run.tune.trained.items() if one.start is not None}
    found |= {f"frozen {own.name} {name}": one for own in run.tune.owns for name, one in own.frozen.items()}
    found |= {f"chain {path}": value for path, value in run.chain.tensors().items()}
    found |= {f"state {slot} {key}": value for slot, state in run.states.items() for key, value in state.items()}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, Tensor) else value == right[key]
        assert same, key


def assert_resumes(engine: Any, now: Now, folder: Path, **setting: Any) -> None:
    """Three steps, killed, and three more by a fresh engine are six without a kill, bit for bit."""
    run = build(engine, **setting)
    go(run, now, 0, 3)
    save(folder, run, {"step": 3})
    go(run, now, 3, 6)
    fresh = build(engine, **setting)
    assert restore(folder, fresh) == {"step": 3}
    go(fresh, now, 3, 6)
    assert_equal(everything(fresh), everything(run))


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("technique ")])
def test_fault_27_killed_and_resumed_at_any_step(engine: Any, now: Now, tmp_path: Path, name: str) -> None:
    """Fault 27: resuming at step k equals the uninterrupted run bit for bit: weights, moments, draws. Where what was resumed at every
    step takes the next one as the run did, it ends as the run did; from the first it is followed to the end. Every technique alone
    goes through the loop itself in `tests/contracts/test_contracts_loop.py`."""
    run = build(engine, **SETTINGS[name])
    saved, went = [], [everything(run)]
    for k in range(STEPS):
        run.tune.snapshot("here")
        saved.append((k, save(tmp_path / f"step-{k}", run, {"step": k})))
        go(run, now, k, k + 1)
        went.append(everything(run))
    for k, folder in saved[1:]:
        fresh, then = build(engine, **SETTINGS[name]), went[k]
        assert restore(folder, fresh) == {"step": k}
        assert_equal(everything(fresh), then)
        with fresh.tune.at("here"):
            assert_equal(
                {n: p.data for n, p in fresh.tune.model.named_parameters()},
                {n.removeprefix("live "): p for n, p in then.items() if n.startswith("live ")},
            )
        last = STEPS if k == 1 else k + 1
        go(fresh, now, k, last)
        assert_equal(everything(fresh), went[last])


def test_resuming_twice_is_resuming_once(engine: Any, now: Now, tmp_path: Path) -> None:
    run = build(engine, tune="keep_entries")
    go(run, now, 0, 3)
    save(tmp_path / "first", run, {})
    fresh = build(engine, tune="keep_entries")
    restore(tmp_path / "first", fresh)
    save(tmp_path / "second", fresh, {})
    assert (tmp_path / "first" / TENSORS).read_bytes() == (tmp_path / "second" / TENSORS).read_bytes()


def test_a_damaged_checkpoint_is_passed_over_and_only_the_newest_are_kept(engine: Any, now: Now, tmp_path: Path) -> None:
    run = build(engine, tune="some_rows")
    for k in (9, 10, 11):
        save(tmp_path / f"step-{k}", run, {"step": k})
    save(tmp_path / "step-11", run, {"step": 11, "again": True})
    assert read(tmp_path / "step-11")[2]["again"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11", "step-9"]
    damaged = bytearray((tmp_path / "step-11" / TENSORS).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "step-11" / TENSORS).write_bytes(damaged)
    with pytest.raises(LuthierError, match="the checksum differs"):
        read(tmp_path / "step-11")
    assert latest(tmp_path) == tmp_path / "step-10"
    (tmp_path / "step-10" / FACTS).write_text("{")
    assert latest(tmp_path) == tmp_path / "step-9"
    prune(tmp_path, 1)
    assert len(list(tmp_path.iterdir())) == 3, "the newest cannot be read: nothing may go"
    save(tmp_path / "step-12", run, {"step": 12})
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-12"]


def test_another_recipes_checkpoint_is_refused(engine: Any, tmp_path: Path) -> None:
    save(tmp_path / "one", build(engine, tune="some_rows"), {})
    with pytest.raises(LuthierError, match="the checkpoint lacks `lora/"):
        restore(tmp_path / "one", build(engine, tune="lora"))


def test_a_checkpoint_holds_tensors_and_plain_text_only(engine: Any, now: Now, tmp_path: Path) -> None:
    run = build(engine, tune="growing", optimizer=["clip", "adamw"])
    go(run, now, 0, 2)
    save(tmp_path / "one", run, {"step": 2})
    assert {path.name for path in (tmp_path / "one").iterdir()} == {FACTS, TENSORS}
    plain = json.loads((tmp_path / "one" / FACTS).read_text())["plain"]
    assert any(key.startswith("chain|clip|") for key in plain) and any(key.startswith("state|growing|") for key in plain)


def test_a_selection_that_comes_out_otherwise_is_that_of_the_checkpoint(engine: Any, now: Now, tmp_path: Path) -> None:
    """On another machine a ranking may fall otherwise: the numbers in a checkpoint belong to the entries that it names."""

    def selecting(index: list[int]) -> Part:
        def choose(parts: Any, services: Any) -> dict[Place, Select]:
            return {parts.select(target_modules=["mlp_down"])[0]: Select("flat", torch.tensor(index), decay="start")}

        return Part(name="some", kind="selective", options={}, values=(Selective(choose),))

    run = build(engine, tune=[selecting([1, 5, 9])])
    go(run, now, 0, 3)
    folder = save(tmp_path / "step-3", run, {"step": 3})
    again = build(engine, tune=[selecting([1, 6, 9])])
    restore(folder, again)
    assert_equal(everything(again), everything(run))
    go(run, now, 3, 5)
    go(again, now, 3, 5)
    assert_equal(everything(again), everything(run))
