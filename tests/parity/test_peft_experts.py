"""LoRA at experts and routers here and in PEFT (`target_parameters`): the same factors give the same logits, gradients and step, and each
reads the other's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.errors import LuthierError
from luthier.export import export_peft, load_peft
from luthier.kinds import Now
from luthier.methods.weight_delta.lora import lora
from luthier.models.parts import map_parts
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.toys.mixtures import MIXTURES, mixture

peft = pytest.importorskip("peft")

# PEFT looks for parameters' ranks among modules alone, says that it found none, and then uses them all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")

IDS = torch.arange(6, 46).reshape(2, 20)
TARGETS = {
    "mixtral": ["gate.weight", "experts.gate_up_proj", "experts.down_proj"],
    "gpt_oss": ["router.weight", "experts.gate_up_proj", "experts.down_proj"],
    "llama4_text": ["router.weight", "experts.gate_up_proj", "experts.down_proj"],
}


def tuned(family: str, *techniques: Any, train: bool = True) -> Tune:
    model = mixture(family)
    tune = Tune(model, map_parts(model), keep_base=True)
    for number, technique in enumerate(techniques):
        tune.add(f"slot{number}", technique, RunServices(tune, f"slot{number}", Now(seed=0)), {})
    rng = torch.Generator().manual_seed(5)
    if train:
        tune.set({key: 0.1 * torch.randn(one.master.shape, generator=rng) for key, one in tune.trained.items()})
    return tune


def theirs_on(family: str, **options: Any) -> Any:
    """PEFT's LoRA on the same model, with random factors."""
    config = peft.LoraConfig(target_modules=[], target_parameters=TARGETS[family], **options)
    model = peft.get_peft_model(mixture(family), config).eval()
    rng = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def assert_same(one: Any, other: Any, family: str) -> None:
    left, right = logits(one), logits(other)
    assert float((left - logits(mixture(family))).abs().max()) > 0.05
    assert float((left - right).abs().max()) < 1e-10


def learn(model: Any) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_the_same_factors_give_the_same_logits_and_the_same_step(family: str, rank_stabilized: bool, tmp_path: Path) -> None:
    theirs = theirs_on(family, r=2, lora_alpha=6, use_rslora=rank_stabilized)
    theirs.save_pretrained(tmp_path / "adapter")
    tune = tuned(family)
    tune.add("lora", load_peft(tmp_path / "adapter", tune), RunServices(tune, "lora", Now(seed=0)), {})
    assert len(tune.additions) == 6 and next(iter(tune.additions)).value.scale == (6 / 2**0.5 if rank_stabilized else 3.0)
    assert_same(tune.model, theirs, family)
    learn(theirs)
    learn(tune.model)
    for parameter in theirs.parameters():
        if parameter.grad is not None:
            assert float(parameter.grad.abs().max()) > 1e-7
            parameter.data -= 0.5 * parameter.grad
    tune.set({name: one.master.detach() - 0.5 * one.gradient for name, one in tune.trained.items() if one.gradient is not None})
    moved = logits(theirs)
    assert_same(tune.model, theirs, family)
    theirs_at_start = peft.PeftModel.from_pretrained(mixture(family), tmp_path / "adapter")
    assert float((logits(theirs_at_start) - moved).abs().max()) > 1e-3


EXPORTS = {
    "plain": lambda: [lora(rank=2, target_modules=("expert", "router", "attention"))],
    "experts alone": lambda: [lora(rank=2, target_modules=("expert",))],
    "other ranks and scales": lambda: [
        lora(rank=2, target_modules=("expert",)),
        lora(rank=3, alpha=5.0, target_modules=("router", "attention_query")),
    ],
    "two at a place": lambda: [lora(rank=2, target_modules=("expert",)), lora(rank=1, alpha=7.0, target_modules=("expert",))],
}


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", EXPORTS)
def test_peft_reads_what_is_exported(name: str, family: str, tmp_path: Path) -> None:
    tune = tuned(family, *EXPORTS[name]())
    export_peft(tune, tmp_path / "adapter", "tiny:mixture")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is False and all("expert" in one or "weight" in one for one in config["target_parameters"])
    assert all("attn" in one for one in config["target_modules"])
    theirs = peft.PeftModel.from_pretrained(mixture(family), tmp_path / "adapter").eval()
    assert_same(theirs, tune.model, family)
    again = tuned(family)
    again.add("lora", load_peft(tmp_path / "adapter", again), RunServices(again, "lora", Now(seed=0)), {})
    assert_same(again.model, tune.model, family)


def test_factors_of_other_experts_are_refused(tmp_path: Path) -> None:
    """Rows that do not divide by the model's experts, and an adapter for more experts than it has."""
    export_peft(tuned("mixtral", lora(rank=2, target_modules=("expert",))), tmp_path / "adapter", "tiny:mixtral")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(LuthierError, match="are not those of 4 experts") as error:
        load_peft(tmp_path / "adapter", tuned("mixtral"))
    assert error.value.fix
    wide = name.replace("lora_A", "lora_B")
    save_file({**tensors, wide: tensors[wide][:-1].contiguous()}, file)
    with pytest.raises(LuthierError, match="do not fit a weight of shape"):
        load_peft(tmp_path / "adapter", tuned("mixtral"))
