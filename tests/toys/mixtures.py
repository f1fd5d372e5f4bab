"""Tiny random mixtures of experts whose families store their experts' matrices in other ways than Mixtral."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers

from tests.toys.helpers import model_of

_COMMON: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 260,
    "num_local_experts": 4,
    "pad_token_id": 0,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "experts_implementation": "eager",
    },
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    "glm4_moe": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "experts_implementation": "eager",
    },
}
MIXTURES = ("mixtral", "qwen3_moe", *_FAMILIES)
"""[E, out, in]; the same with narrow experts; [E, in, out] with biases, gates and ups in turn; [E, in, out] where every token passes
through all experts; a router of sigmoids with a bias for the choice, behind a block without experts."""


@cache
def _made(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **_COMMON, **_FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return model.eval()


def mixture(family: str) -> Any:
    """A tiny model of two blocks in fp64, one of `MIXTURES`, always the same."""
    return copy.deepcopy(_made(family)) if family in _FAMILIES else model_of(family)
