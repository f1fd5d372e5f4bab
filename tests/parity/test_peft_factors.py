"""Deltas that are low-rank in other ways than LoRA's, exported by their factors: PEFT computes the same logits, and so do we again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier.errors import LuthierError
from luthier.export import export_peft, load_peft
from luthier.kinds import Now, WeightDelta
from luthier.methods.weight_delta.lora import lora
from luthier.models import map_parts, tiny
from luthier.registry import part
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import calibration
from tests.parity.test_peft_lora import assert_same_logits

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

TECHNIQUES = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "corda": {"rank": 3, "alpha": 6.0},
    "lora_xs": {"rank": 4},
    "lora_sb": {"rank": 4},
    "svfit": {"rank": 6},
}


def weight_delta(name: str) -> WeightDelta:
    """The part of a technique that adds a delta."""
    return next(value for value in part(name, **TECHNIQUES[name]).values if isinstance(value, WeightDelta))


def tuned(architecture: str, *techniques: WeightDelta) -> Tune:
    """A tiny model with techniques attached, what trains moved away from the start, and some singular values at zero."""
    model = tiny(architecture)
    tune = Tune(model, map_parts(model), keep_base=True)
    for number, technique in enumerate(techniques):
        slot = f"slot{number}"
        tune.add(slot, technique, RunServices(tune, slot, Now(learning_rate=0.01), calibration), {})
    rng = torch.Generator().manual_seed(5)
    for name, one in tune.trained.items():
        moved = one.master.detach() + 0.1 * torch.randn(one.master.shape, generator=rng)
        if name.endswith(".values"):
            moved[: int(torch.randint(0, 5, (), generator=rng))] = 0.0
        tune.set({name: moved})
    return tune


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_peft_reads_what_is_exported(name: str, architecture: str, tmp_path: Path) -> None:
    tune = tuned(architecture, weight_delta(name))
    export_peft(tune, tmp_path / "adapter", f"tiny:{architecture}")
    theirs = peft.PeftModel.from_pretrained(tiny(architecture), tmp_path / "adapter")
    assert_same_logits(tune.model, theirs)
    used = {name.replace(".default", "") for name, _ in theirs.named_parameters() if "lora_" in name}
    assert used == set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    bare = tiny(architecture)
    again = Tune(bare, map_parts(bare))
    again.add("adapter", load_peft(tmp_path / "adapter", again), RunServices(again, "adapter", Now()), {})
    assert_same_logits(again.model, tune.model)


def test_factors_go_together_with_lora_at_one_place(tmp_path: Path) -> None:
    tune = tuned("gpt2", lora(rank=3, alpha=5.0), weight_delta("svfit"))
    export_peft(tune, tmp_path / "adapter", "tiny:gpt2")
    assert_same_logits(tune.model, peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path / "adapter"))


def test_pruned_triplets_are_not_written(tmp_path: Path) -> None:
    """The ranks are those that are left, with alpha = R for a scale of 1, and a module without any is left out."""
    tune = tuned("llama", weight_delta("adalora"))
    emptied = tune.owns[0]
    assert emptied.place is not None
    tune.set({emptied.trained["values"].name: torch.zeros(4, 1)})
    export_peft(tune, tmp_path / "adapter", "tiny:llama")
    config: dict[str, Any] = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = set()
    for own in tune.owns:
        assert own.place is not None
        rank = int((own.masters()["values"] != 0).sum())
        ranks.add(rank)
        name = f"base_model.model.{own.place.module}.lora_A.weight"
        assert (name in stored) == (own.place.module in config["target_modules"]) == (rank > 0)
        if rank:
            assert len(stored[name]) == rank
    assert {0, 1, 2, 3, 4} >= ranks > {0}
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"]
    assert_same_logits(tune.model, peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter"))


def test_what_trains_beside_factors_is_not_lost(tmp_path: Path) -> None:
    """A delta without factors under any name is refused."""
    whole = weight_delta("svfit")._replace(factors=None)
    with pytest.raises(LuthierError, match="`slot1` is no low-rank delta"):
        export_peft(tuned("llama", weight_delta("lora_xs"), whole), tmp_path / "adapter", "tiny:llama")
