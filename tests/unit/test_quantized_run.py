"""Whole runs on quantized bases: trained, resumed, opened again, exported, probed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier
from luthier.delta.forms import LowRank
from luthier.export import export_gguf
from luthier.export.model import divergence, outputs
from luthier.models.load import load_model
from luthier.models.parts import map_parts
from luthier.models.quantized import BLOCK, expand, quantize, quantized
from luthier.planning.cuts import find_cuts
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe, same_steps
from luthier.results.folder import Run, read_run
from luthier.results.opened import open_base, open_run
from luthier.runs.export import export
from luthier.runs.probe import compare_weights
from tests.unit.test_export_gguf import model_of, trained_tokenizer, tuned

ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("one", "two", "three", "four")]
SETS = {"prose": {"rows": [{"text": "The lane is red and old."}, {"text": "The ford is wide."}], "metric": "loss"}}
IDS = [[5, 9, 200, 31, 77, 8, 4], [14, 15]]
RUNS: dict[str, dict[str, Any]] = {
    "nf4": {"tune": "lora", "train": {"packing": True, "gradient_checkpointing": True}, "evaluate": SETS},
    "int8": {"tune": "lora", "quantize": "int8"},
    "gpt2": {"model": "tiny:gpt2", "tune": ["lora", "ia3"]},
    "bf16": {"tune": "lora", "train": {"precision": "bf16"}},
    "whole": {"tune": ["lora", "loca"]},
    "factors": {"tune": "lora_xs"},
    "beside": {"tune": ["prefix_tuning", "prompt_tuning", "adapter"]},
}


def run_of(out: Path, *, train: dict[str, Any] | None = None, **keys: Any) -> Run:
    steps = {"steps": 4, "batch_rows": 4, "precision": "fp32", "learning_rate": 0.02, **(train or {})}
    model = {"model": "tiny:llama", "quantize": "nf4", "rows": {"train": ROWS}, "out": str(out), "repeat_baseline": False}
    return luthier.train({**model, **keys, "train": steps})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {name: run_of(tmp_path_factory.mktemp("runs"), **keys) for name, keys in RUNS.items()}


def close(left: list[Tensor], right: list[Tensor], within: float = 1e-5) -> bool:
    return all(torch.allclose(one, other, atol=within) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_an_opened_run_is_the_trained_model_on_codes(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    tune, _ = open_run(read_run(str(run.folder), ""))
    assert quantized(tune.model) and run.tune is not None
    expected, found = (one.run(lambda one=one: outputs(one.model, IDS)) for one in (run.tune, tune))
    with run.tune.off():
        base = outputs(run.tune.model, IDS)
    assert not close(expected, base, 1e-3), "training did something"
    assert close(found, expected, 1e-5 if name != "bf16" else 0.02)
    anew, _ = open_base(run)
    assert close(outputs(anew.model, IDS), base, 0.0)
    assert all(math.isfinite(line["loss"]) for line in run.facts["history"])


def test_what_a_run_says_of_its_base_and_its_delta(runs: dict[str, Run]) -> None:
    facts = json.loads((runs["nf4"].folder / "run.json").read_text())
    assert any(line.startswith("holds ") and "4 bits (nf4)" in line for line in facts["plan"])
    assert facts["metrics"]["prose"]["before"] != facts["metrics"]["prose"]["after"]
    dense = load_model("tiny:llama")
    assert facts["total_parameters"] == sum(one.numel() for one in dense.parameters())
    expand(base := load_model("tiny:llama", quantize="nf4"), torch.float32)
    query = next(one for one in facts["delta"]["by_place"] if (one["block"], one["module_type"]) == (0, "attention_query"))
    assert query["base_norm"] == pytest.approx(float(base.model.layers[0].self_attn.q_proj.weight.norm()), rel=1e-6)
    assert 0 < query["relative"] < 10
    delta = luthier.Delta.load(runs["nf4"].folder / "delta.safetensors")
    assert delta.base.dtype == "float32" and delta.base.fingerprint == facts["model"]["fingerprint"]
    assert all(isinstance(form, LowRank) for forms in delta.changes.values() for form in forms)


@pytest.mark.parametrize("name", ["nf4", "int8", "gpt2", "bf16", "whole"])
def test_the_exported_model_is_dense_and_says_what_merging_cost(runs: dict[str, Run], tmp_path: Path, name: str) -> None:
    run = runs[name]
    assert run.tune is not None
    said = export(str(run.folder), tmp_path / "model")
    assert said["merge_kl"] < (1e-8 if name != "bf16" else 1e-2)
    exported = load_model(str(tmp_path / "model"), dtype=torch.bfloat16 if name == "bf16" else torch.float32)
    assert not quantized(exported) and "quantization_config" not in (tmp_path / "model" / "config.json").read_text()
    live, found = outputs(run.tune.model, IDS), outputs(exported, IDS)
    assert divergence(found, live) == pytest.approx(0.0, abs=1e-8 if name != "bf16" else 1e-2)


def test_the_adapter_loads_in_peft_on_the_same_numbers(runs: dict[str, Run], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for name in ("nf4", "int8", "factors"):
        run = runs[name]
        said = export(str(run.folder), tmp_path / name, form="peft")
        assert run.tune is not None and said["base_fingerprint"] == run.facts["model"]["fingerprint"]
        base = load_model("tiny:llama", quantize=run.facts["recipe"]["quantize"])
        expand(base, torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / name).eval()
        assert close(outputs(loaded, IDS), outputs(run.tune.model, IDS))


def test_a_gguf_file_is_that_of_the_dense_model(tmp_path: Path) -> None:
    model = model_of("llama")
    quantize(model, map_parts(model), "nf4")
    tune = tuned(model)
    live = outputs(model, IDS)
    said = export_gguf(tune, trained_tokenizer(), tmp_path / "model.gguf")
    assert abs(said["kl"]) < 1e-8 and said["same_greedy_tokens"] == 1.0 and quantized(model)
    assert close(outputs(load_model(str(tmp_path / "model.gguf")), IDS), live)


def test_probes_look_at_the_numbers_that_the_codes_stand_for(runs: dict[str, Run]) -> None:
    run = runs["nf4"]
    weights = compare_weights(str(run.folder))
    expand(base := load_model("tiny:llama", quantize="nf4"), torch.float32)
    delta = luthier.Delta.load(run.folder / "delta.safetensors")
    assert {place.parameter for place in weights.changed} == set(delta)
    for place in weights.changed:
        assert torch.equal(weights.base(place), base.get_parameter(place.parameter).detach())
        assert torch.equal(weights.change(place), delta.spread(place.parameter))
    assert not compare_weights(str(run.folder), str(run.folder)).changed, "a run against itself"
    named = compare_weights("tiny:llama", str(run.folder))
    assert named.changed == weights.changed
    assert torch.equal(named.base(named.changed[0]), weights.base(named.changed[0])), "what was trained is the quantized base"


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", tune="lora", train={"save_every": 1})
    assert whole.tune is not None

    class StopError(Exception):
        """Ends a run from outside."""

    def stop(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 2:
            raise StopError

    with pytest.raises(StopError):
        luthier.train({**whole.facts["recipe"], "rows": {"train": ROWS}, "out": str(tmp_path / "stopped")}, tell=stop)
    folder = next((tmp_path / "stopped").iterdir())
    again = luthier.train({**whole.facts["recipe"], "rows": {"train": ROWS}, "out": str(tmp_path / "stopped")}, resume=folder)
    assert again.facts["weights_sha256"] == whole.facts["weights_sha256"]
    assert (folder / "delta.safetensors").read_bytes() == (whole.folder / "delta.safetensors").read_bytes()


def test_a_recipe_from_before_asks_for_the_same_steps() -> None:
    plain = make_recipe({"model": "tiny:llama", "rows": {"train": "x"}}).as_plain()
    older = {key: value for key, value in plain.items() if key != "quantize"}
    assert same_steps(plain, older) and not same_steps({**plain, "quantize": "nf4"}, older)


@pytest.mark.usefixtures("counted")
def test_the_plan_says_what_is_held(tmp_path: Path) -> None:
    recipe = make_recipe({"model": "tiny:llama", "rows": {"train": ROWS}, "tune": "lora", "quantize": "nf4", "out": str(tmp_path)})
    plan = make_plan(recipe)
    plain = make_plan(make_recipe({**recipe.as_plain(), "rows": {"train": ROWS}, "quantize": "none"}))
    numbers = sum(one.numbers for one in quantized(plan.model).values())
    line = next(line for line in plan.lines() if line.startswith("holds"))
    assert f"{numbers:,} numbers of the blocks in 4 bits (nf4)" in line
    assert plan.total_parameters == plain.total_parameters and plan.fingerprint != plain.fingerprint
    assert plain.estimate.weights - plan.estimate.weights == numbers * plan.dtype.itemsize - numbers // 2 - numbers // BLOCK * 4
    assert not plan.estimate.rough


def test_what_will_not_fit_is_told_to_use_fewer_bits(tmp_path: Path) -> None:
    def cuts(**keys: Any) -> tuple[dict[str, int], int]:
        recipe = {"model": "tiny:llama", "rows": {"train": ROWS}, "out": str(tmp_path), "train": {"precision": "fp32"}, **keys}
        plan = make_plan(make_recipe(recipe))
        return dict(find_cuts(plan.recipe, plan.engine, plan.parts, plan.feed, plan.dtype, plan.estimate, 0)), plan.estimate.weights

    lora, dense = cuts(tune="lora")
    fewer, held = cuts(tune="lora", quantize="nf4")
    assert lora["quantize=nf4"] == dense - held > 0
    assert not any("quantize" in change or change in ("tune=half", "tune=full") for change in fewer)
    full, _ = cuts(tune="full")
    assert full["tune=lora with quantize=nf4"] == full["tune=lora"] + dense - held and "quantize=nf4" not in full
