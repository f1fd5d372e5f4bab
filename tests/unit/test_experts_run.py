"""Whole runs on a mixture of experts: planned, broken off, resumed, opened again, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier
from luthier.delta import Delta
from luthier.delta.forms import LowRank
from luthier.export.model import outputs
from luthier.models.load import load_model
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.results.folder import Run, list_runs, read_run
from luthier.results.opened import open_run
from luthier.results.start import DELTA

ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four")]
IDS = [[5, 9, 200, 31, 77, 8, 4], [14, 15]]
TUNE = {"lora": {"rank": 2, "target_modules": ["linear", "expert", "router"]}}


def recipe(out: Path, **keys: Any) -> dict[str, Any]:
    train = {"steps": 4, "batch_rows": 2, "precision": "fp32", "learning_rate": 0.02, "save_every": 1, **keys.pop("train", {})}
    base = {"model": "tiny:mixtral", "rows": {"train": ROWS}, "out": str(out), "repeat_baseline": False}
    return {**base, "tune": TUNE, "objective": ["cross_entropy", "load_balance"], **keys, "train": train}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return luthier.train(recipe(tmp_path_factory.mktemp("runs"), train={"gradient_checkpointing": True}))


def close(left: list[Tensor], right: list[Tensor], within: float = 1e-5) -> bool:
    return all(torch.allclose(one, other, atol=within) for one, other in zip(left, right, strict=True))


def test_a_run_keeps_the_factors_of_every_expert(run: Run) -> None:
    delta = Delta.load(run.folder / DELTA)
    stacks = [form for name in delta if ".experts." in name for form in delta[name]]
    assert len(stacks) == 4
    for form in stacks:
        assert isinstance(form, LowRank) and form.up_OR.shape[0] == form.down_RI.shape[0] == 4
        assert bool((form.up_OR.abs().amax((1, 2)) > 0).all()), "every expert learned"
    assert run.tune is not None
    wanted = outputs(run.tune.model, IDS)
    with run.tune.off():
        assert not close(wanted, outputs(run.tune.model, IDS), 1e-2)
    tune, _ = open_run(read_run(str(run.folder), ""))
    assert close(outputs(tune.model, IDS), wanted)


@pytest.mark.parametrize("name", ["lora", "lora_xs"])
def test_beside_a_quantized_base_the_factors_stand_at_the_experts_again(tmp_path: Path, name: str) -> None:
    """Linear maps are held in few bits, and experts as they are: both of an opened run have their deltas beside them."""
    trained = luthier.train(
        recipe(
            tmp_path,
            tune={name: {"rank": 2, "target_modules": ["linear", "expert"]}},
            quantize="int8",
            objective="cross_entropy",
            train={"steps": 2},
        )
    )
    assert trained.tune is not None
    wanted = outputs(trained.tune.model, IDS)
    with trained.tune.off():
        assert not close(wanted, outputs(trained.tune.model, IDS), 1e-2)
    tune, _ = open_run(read_run(str(trained.folder), ""))
    assert close(outputs(tune.model, IDS), wanted)
    assert {one.place.role for one in tune.additions if one.place is not None} >= {"expert", "attention_query"}


def test_broken_off_and_resumed_it_ends_with_the_same_numbers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        luthier.train(recipe(tmp_path, train={"gradient_checkpointing": True}), tell=stop)
    resumed = luthier.train(recipe(tmp_path, train={"gradient_checkpointing": True}), resume=list_runs(tmp_path)[-1].folder)
    one, other = Delta.load(run.folder / DELTA), Delta.load(resumed.folder / DELTA)
    assert list(one) == list(other) and len(one) > 8
    assert all(torch.equal(one.spread(name), other.spread(name)) for name in one)


@pytest.mark.parametrize("form", ["model", "peft"])
def test_what_is_exported_is_the_trained_model(run: Run, tmp_path: Path, form: str) -> None:
    assert run.tune is not None
    wanted = outputs(run.tune.model, IDS)
    run.export(tmp_path / "exported", form=form)
    if form == "peft":
        peft = pytest.importorskip("peft")
        found = peft.PeftModel.from_pretrained(load_model("tiny:mixtral"), tmp_path / "exported")
    else:
        found = load_model(str(tmp_path / "exported"))
    assert close(outputs(found, IDS), wanted)


def test_the_plan_says_what_a_token_uses_and_whether_experts_train(tmp_path: Path) -> None:
    both = make_plan(make_recipe(recipe(tmp_path)))
    lines = "\n".join(both.lines())
    total = sum(one.numel() for one in both.model.parameters())
    stacks = sum(one.numel() for name, one in both.model.named_parameters() if ".experts." in name)
    assert f"2 of 4 experts for a token: {total - stacks // 2:,} of {total:,} parameters are active" in lines
    assert both.as_json()["active_parameters"] == total - stacks // 2
    assert "experts do not train" not in lines and "what trains put into their matrices" in lines
    # One block's matrices and their gradients, and the larger of them once more: 192 x 32 and 32 x 96 numbers for each of 4 experts.
    assert both.engine.tune.room_for_experts == 4 * 4 * (2 * (192 * 32 + 32 * 96) + 192 * 32)
    linear = make_plan(make_recipe(recipe(tmp_path, tune="lora", objective="cross_entropy")))
    lines = "\n".join(linear.lines())
    assert "experts do not train" in lines and "into their matrices" not in lines and linear.engine.tune.room_for_experts == 0
    assert both.estimate.activations - linear.estimate.activations >= both.engine.tune.room_for_experts
    # Passes cost what a token passes through, and the gradients of whole matrices come on top.
    assert both.estimate.seconds > 1.3 * linear.estimate.seconds
    whole = "\n".join(make_plan(make_recipe(recipe(tmp_path, tune="full"))).lines())
    assert "experts do not train" not in whole and "into their matrices" not in whole
    plain = make_plan(make_recipe(recipe(tmp_path, model="tiny:llama", tune="lora", objective="cross_entropy")))
    assert "expert" not in "\n".join(plain.lines()) and plain.as_json()["active_parameters"] == plain.total_parameters
