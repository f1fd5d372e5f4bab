"""LoRA here and in PEFT: the same weights give the same logits and gradients, and each reads the other's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from luthier.export import export_peft, load_peft
from luthier.kinds import Now
from luthier.methods.weight_delta.lora import lora
from luthier.models import map_parts, tiny
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.tolerance import TINY, assert_rounded

peft = pytest.importorskip("peft")

# PEFT says that it sets `fan_in_fan_out` for GPT-2 by itself, and that a tied head carries an adapter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

MODULES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
}
IDS = torch.arange(6, 46).reshape(2, 20)


def tuned(architecture: str, *techniques: Any, train: bool = True) -> Tune:
    """A tiny model with techniques attached, in fp32, their tensors moved away from the start."""
    model = tiny(architecture)
    tune = Tune(model, map_parts(model), keep_base=True)
    for number, technique in enumerate(techniques):
        tune.add(f"slot{number}", technique, RunServices(tune, f"slot{number}", Now(seed=0)), {})
    rng = torch.Generator().manual_seed(5)
    if train:
        tune.set({key: 0.1 * torch.randn(one.master.shape, generator=rng) for key, one in tune.trained.items()})
    return tune


def peft_model(architecture: str, targets: list[str] | None = None, **options: Any) -> Any:
    """PEFT's LoRA on the same tiny model, with random factors."""
    config = peft.LoraConfig(
        target_modules=targets or MODULES[architecture],
        fan_in_fan_out=architecture == "gpt2",
        task_type="CAUSAL_LM",
        **options,
    )
    model = peft.get_peft_model(tiny(architecture), config).eval()
    rng = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    return model


def assert_same_logits(left: Any, right: Any) -> None:
    with torch.no_grad():
        one, other = left(IDS).logits, right(IDS).logits
    assert float((one - tiny_logits(left)).abs().max()) > 0.1
    assert_rounded(one, other, TINY)


def tiny_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = tiny(model.config.model_type)(IDS).logits
    return logits


@pytest.mark.parametrize("architecture", MODULES)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_the_same_factors_give_the_same_logits_and_gradients(architecture: str, rank_stabilized: bool) -> None:
    theirs = peft_model(architecture, r=4, lora_alpha=12, use_rslora=rank_stabilized)
    # GPT-2's query, key and value are one module there and three places here: their factors are shared there.
    tune = tuned(architecture, lora(rank=4, alpha=12.0, rank_stabilized=rank_stabilized), train=False)
    factors: dict[str, dict[str, Any]] = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            module, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
            factors.setdefault(module, {})[rest[0]] = parameter
    for one in tune.owns:
        assert one.place is not None
        pair = factors[one.place.module]
        tune.set({one.trained["down"].name: pair["A"].data})
        tune.set({one.trained["up"].name: pair["B"].data[one.place.start : one.place.stop]})
    assert_same_logits(tune.model, theirs)

    labels = {"input_ids": IDS, "labels": IDS}
    theirs(**labels).loss.backward()
    tune.model(**labels).loss.backward()
    for module, pair in factors.items():
        own = [one for one in tune.owns if one.place is not None and one.place.module == module]
        down_RI = sum(one.trained["down"].gradient for one in own)  # type: ignore[misc]
        up_OR = torch.cat([one.trained["up"].gradient for one in own])  # type: ignore[misc]
        torch.testing.assert_close(down_RI, pair["A"].grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(up_OR, pair["B"].grad, rtol=1e-5, atol=1e-5)
        assert float(pair["A"].grad.abs().max()) > 1e-4 and float(pair["B"].grad.abs().max()) > 1e-4


EXPORTS = {
    "plain": lambda: [lora(rank=4)],
    "rank-stabilized": lambda: [lora(rank=4, rank_stabilized=True, alpha=3.0)],
    "different ranks and scales": lambda: [
        lora(rank=4, target_modules=("attention",)),
        lora(rank=2, alpha=11.0, target_modules=("mlp",)),
    ],
    "two at a place": lambda: [lora(rank=4), lora(rank=3, alpha=5.0, target_modules=("mlp_down", "attention_key"))],
    "some parts": lambda: [lora(rank=4, target_modules=("attention_value", "mlp_up"))],
    "a head": lambda: [lora(rank=2, target_modules=("linear", "head"))],
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("name", EXPORTS)
def test_peft_reads_what_is_exported(name: str, architecture: str, tmp_path: Path) -> None:
    tune = tuned(architecture, *EXPORTS[name]())
    export_peft(tune, tmp_path / "adapter", f"tiny:{architecture}")
    theirs = peft.PeftModel.from_pretrained(tiny(architecture), tmp_path / "adapter")
    assert_same_logits(tune.model, theirs)
    # Every factor that was written is in use there.
    used = {name.replace(".default", "") for name, _ in theirs.named_parameters() if "lora_" in name}
    assert used == set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_exported_reads_back(name: str, architecture: str, tmp_path: Path) -> None:
    tune = tuned(architecture, *EXPORTS[name]())
    export_peft(tune, tmp_path / "adapter", f"tiny:{architecture}")
    bare = tuned(architecture)
    again = tuned(architecture, load_peft(tmp_path / "adapter", bare), train=False)
    assert_same_logits(again.model, tune.model)


@pytest.mark.parametrize("architecture", MODULES)
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj|c_fc": 2}, "alpha_pattern": {r"(layers|h)\.1\..*": 3}},
        {"r": 2, "layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "one block"],
)
def test_adapters_made_by_peft_load(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft_model(architecture, **options)
    theirs.save_pretrained(tmp_path)
    tune = tuned(architecture, load_peft(tmp_path, tuned(architecture)), train=False)
    assert_same_logits(tune.model, theirs)


def test_an_adapter_of_peft_on_some_modules_and_a_head(tmp_path: Path) -> None:
    theirs = peft_model("llama", ["layers.0.mlp.up_proj", "lm_head"], r=4)
    theirs.save_pretrained(tmp_path)
    tune = tuned("llama", load_peft(tmp_path, tuned("llama")), train=False)
    assert_same_logits(tune.model, theirs)


@pytest.mark.parametrize("architecture", MODULES)
def test_merging_gives_what_peft_merges(architecture: str, tmp_path: Path) -> None:
    theirs = peft_model(architecture, r=4)
    theirs.save_pretrained(tmp_path)
    tune = tuned(architecture, load_peft(tmp_path, tuned(architecture)), train=False)
    tune.merge()
    expected = theirs.merge_and_unload().state_dict()
    for name, values in tune.model.state_dict().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-6)


def test_patterns_name_modules_exactly(tmp_path: Path) -> None:
    # As a regular expression, `.` in `layers.1` would also match in other names.
    tune = tuned("llama", lora(rank=4, target_modules=("attention",)), lora(rank=2, target_modules=("mlp",)))
    export_peft(tune, tmp_path / "adapter", "tiny:llama")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 16.0 and len(config["target_modules"]) == 14
    assert config["rank_pattern"][r"model\.layers\.1\.mlp\.up_proj"] == 2 and len(config["rank_pattern"]) == 6
    # Both scale by alpha / rank with alpha 16, so only ranks differ.
    assert config["alpha_pattern"] == {}
