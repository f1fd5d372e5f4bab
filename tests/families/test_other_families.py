"""What single families do otherwise, where it stopped a run or trained what it should not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import luthier
from luthier.errors import LuthierError
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny_tokenizer

ROWS = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(4)]
SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32}


def saved(folder: Path, config: Any) -> str:
    """A tiny random model with a tokenizer, as users have them."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "config",
    [
        transformers.FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.1),
        transformers.BloomConfig(**SMALL, n_layer=2, n_head=4),
        transformers.PersimmonConfig(**SMALL, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    ],
    ids=lambda config: config.model_type,
)
def test_attention_that_keeps_its_dropout_as_a_layer_trains(config: Any, tmp_path: Path) -> None:
    """The layer was taken for its probability, and every first step ended in a TypeError."""
    train = {"steps": 1, "batch_rows": 2, "precision": "fp32"}
    model = saved(tmp_path / "model", config)
    run = luthier.train({"model": model, "rows": {"train": ROWS}, "tune": "lora", "out": str(tmp_path / "runs"), "train": train})
    assert run.facts["status"] == "finished"


def test_a_model_that_cannot_recompute_its_activations_says_so(tmp_path: Path) -> None:
    """Transformers' own ValueError went through to the user."""
    model = saved(tmp_path / "model", transformers.CTRLConfig(vocab_size=300, n_embd=32, dff=64, n_layer=2, n_head=4))
    recipe = {"model": model, "rows": {"train": ROWS}, "out": str(tmp_path), "train": {"gradient_checkpointing": True}}
    with pytest.raises(LuthierError, match="CTRLLMHeadModel cannot recompute") as caught:
        luthier.train(recipe)
    assert caught.value.where == "train.gradient_checkpointing"


def test_a_router_below_its_gate_is_no_linear_map_like_others() -> None:
    """`linear` reached the router of this family, which was taken for a map that nobody knows."""
    config = transformers.HunYuanMoEV1Config(
        **SMALL,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        moe_topk=2,
    )
    parts = map_parts(transformers.AutoModelForCausalLM.from_config(config))
    routers = [place for place in parts.places if place.role == "router"]
    assert [place.module.rpartition("layers.")[2] for place in routers] == ["0.mlp.gate.wg", "1.mlp.gate.wg"]
    assert not [place for place in parts.select("linear") if "gate.wg" in place.module]
