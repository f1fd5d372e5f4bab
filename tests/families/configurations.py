"""One tiny random configuration of each family of models, built from the classes of `transformers`, and one of each that also reads
images."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 272,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

_LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # Of what turns with the position, as its own configuration has it.
    "head_dim": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-Next": ("qwen3_next", {**_DELTA_NET, **_EXPERTS, "decoder_sparse_step": 1}),
    "Qwen3.5": ("qwen3_5_text", {**_DELTA_NET}),
    "Qwen3.5 MoE": ("qwen3_5_moe_text", {**_DELTA_NET, **_EXPERTS}),
    "DeepSeek-V3": ("deepseek_v3", _LATENT),
    "Gemma 3n": (
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size": [48, 64, 48, 48],
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 272,
            "final_logit_softcapping": 2.0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
        },
    ),
    "Gemma 4": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 4,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 2.0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 272,
        },
    ),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Nemotron-H": (
        "nemotron_h",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "conv_kernel": 4,
            "chunk_size": 8,
        },
    ),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "logits_scaling": 2.0,
            "shared_intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "Falcon-H1": (
        "falcon_h1",
        {
            "lm_head_multiplier": 0.5,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "Bamba": (
        "bamba",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Llama 4": (
        "llama4_text",
        {
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
    ),
    "OLMo 3": ("olmo3", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "GLM-4 MoE": (
        "glm4_moe",
        {
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "Ministral": ("ministral", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "Ministral 3": ("ministral3", {}),
    "Mamba 2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "MiniMax": ("minimax", {"num_local_experts": 4}),
    "Recurrent Gemma": ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 2.0}),
}
"""A name people know, the model type of `transformers`, and what its configuration needs beyond the common sizes."""


_TOKENS = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}
_TURNS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SEEING = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_SEEING = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}

READING_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2-VL": (
        "qwen2_vl",
        {
            "text_config": {**_BASE, "rope_parameters": _TURNS},
            "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 4},
            **_TOKENS,
        },
    ),
    "Qwen3-VL": (
        "qwen3_vl",
        {
            "text_config": {**_BASE, "rope_parameters": _TURNS},
            "vision_config": {**_QWEN_SEEING, "deepstack_visual_indexes": [0]},
            **_TOKENS,
        },
    ),
    "Qwen3.5, with images": (
        "qwen3_5",
        {
            "text_config": {
                **_BASE,
                **_DELTA_NET,
                "rope_parameters": {**_TURNS, "mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25},
            },
            "vision_config": _QWEN_SEEING,
            **_TOKENS,
        },
    ),
    "Gemma 3, with images": (
        "gemma3",
        {
            "text_config": {**_BASE, "model_type": "gemma3_text", "sliding_window": 4},
            "vision_config": {**_SEEING, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 260,
            "boi_token_index": 261,
            "eoi_token_index": 262,
        },
    ),
    "LLaVA": (
        "llava",
        {
            "text_config": {**_BASE, "model_type": "llama"},
            "vision_config": {**_SEEING, "model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 260,
        },
    ),
    "Mistral 3": (
        "mistral3",
        {
            "text_config": {**_BASE, "model_type": "mistral", "sliding_window": None},
            "vision_config": {**_SEEING, "model_type": "pixtral"},
            "image_token_index": 260,
        },
    ),
}
"""The same of models that also read images, loaded whole."""


def configuration(family: str) -> PretrainedConfig:
    """The family's tiny configuration."""
    architecture, settings = READING_IMAGES.get(family) or FAMILIES[family]
    base = {} if family in READING_IMAGES else _BASE
    return transformers.AutoConfig.for_model(architecture, **{**base, **settings})


def build(family: str) -> PreTrainedModel:
    """The family's tiny model, every number random, in evaluation mode and in float32."""
    config = configuration(family)
    auto_class = transformers.AutoModelForImageTextToText if family in READING_IMAGES else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, values in model.named_parameters():
            # The decays of a state space begin within a range, or the state grows without bound.
            if values.dim() > 1 and not name.endswith("A_log"):
                values.normal_(std=config.get_text_config().hidden_size ** -0.5)
            elif not name.endswith("A_log"):
                values.add_(0.05 * torch.randn_like(values))
    return model.eval()
