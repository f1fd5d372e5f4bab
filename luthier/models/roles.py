"""What the tensors of a model do: the roles, groups of roles, and how a parameter's name tells its role.

The name table covers the published architectures by their naming habits, not by one class a family: most families
share their names. A name that no line of the table knows is never guessed from its spelling alone: it is `linear_other`
where it is a linear map of a block, else `other`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# Each pattern is matched against the end of the dotted name, at a dot. The first line that matches decides, so the
# narrow ones stand first.
_IN_BLOCKS: tuple[tuple[str, str], ...] = (
    (r"experts(\..+)?", "expert"),
    (r"(mlp|block_sparse_moe|feed_forward|mixer)\.(gate(\.wg)?|router)|router|router\.(layer|proj)|shared_expert_gate", "router"),
    (r"linear_attn\.[qkvabg]_proj|(linear_attn|mamba|mixer|conv)\.in_proj(_qkvz|_qkv|_ba|_z|_b|_a)?", "mixer_input"),
    (r"(mamba|mixer)\.(x_proj|dt_proj)", "mixer_input"),
    (r"linear_attn\.o_proj|(linear_attn|mamba|mixer|conv)\.out_proj", "mixer_output"),
    (r"(q_a|q_b|kv_a|kv_b)_proj|kv_a_proj_with_mqa", "attention_latent"),
    (r"sinks|altup\.(correction|prediction)_coefs", "other"),
    (r"q_proj|query|q_lin|attention\.attn\.q", "attention_query"),
    (r"k_proj|key|k_lin|attention\.attn\.k", "attention_key"),
    (r"v_proj|value|v_lin|attention\.attn\.v", "attention_value"),
    (r"c_attn|qkv_proj|query_key_value|Wqkv", "attention_query_key_value"),
    (r"o_proj|out_proj|out_lin|attention\.output\.dense|attention\.attn\.o", "attention_output"),
    (r"(attn|attention|self_attn|self_attention)\.(dense|c_proj|Wo)", "attention_output"),
    (r"gate_proj|feed_forward\.w1", "mlp_gate"),
    (r"gate_up_proj|mlp\.Wi|shared_mlp\.input_linear", "mlp_gate_up"),
    (r"up_proj|feed_forward\.w3|fc1|c_fc|fc_in|lin1|dense_h_to_4h|intermediate\.dense", "mlp_up"),
    (
        r"down_proj|feed_forward\.w2|shared_mlp\.output_linear|fc2|fc_out|lin2|dense_4h_to_h|output\.dense|mlp\.(c_proj|Wo)",
        "mlp_down",
    ),
    (r"q_norm|q_layernorm", "query_norm"),
    (r"k_norm|k_layernorm", "key_norm"),
    (r"input_layernorm|operator_norm|ln_1|norm_1|ln_attn|attn_norm|sa_layer_norm", "attention_norm"),
    (r"self_attn_layer_norm|post_self_attn_layernorm|attention\.output\.LayerNorm", "attention_norm"),
    (r"post_attention_layernorm|pre_feedforward_layernorm|post_feedforward_layernorm|post_mlp_layernorm", "mlp_norm"),
    (r"ln_2|norm_2|ln_mlp|mlp_norm|ffn_norm|pre_ff_layernorm|output_layer_norm|final_layer_norm|output\.LayerNorm", "mlp_norm"),
)

_OUTSIDE: tuple[tuple[str, str], ...] = (
    (r"embed_positions|wpe|position_embeddings|relative_attention_bias", "position_embedding"),
    (r"embeddings\.(LayerNorm|norm)|word_embeddings_layernorm", "other_norm"),
    (r"transform\.LayerNorm|vocab_layer_norm|lm_head\.layer_norm", "other_norm"),
    (r"token_type_embeddings|pooler\.dense|pre_classifier|project_in|project_out", "other"),
    (r"transform\.dense|vocab_transform|lm_head\.dense|classifier\.dense", "other"),
    (r"norm|norm_f|embedding_norm|ln_f|final_norm|final_layernorm|final_layer_norm", "final_norm"),
    (r"lm_head|embed_out|score|classifier|qa_outputs|vocab_projector|predictions|decoder|out_proj", "head"),
)


def _first_match(table: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((role for pattern, role in table if re.search(rf"(?:^|\.)(?:{pattern})$", name)), None)


def role_in_block(name: str, siblings: Collection[str]) -> str | None:
    """The role of a parameter inside a block, None when its name is not known.

    Args:
        name: dotted name inside the block, without `.weight` or `.bias`.
        siblings: all such names of the block.
    """
    role = _first_match(_IN_BLOCKS, name)
    # Llama calls the norm before the MLP `post_attention_layernorm`; Gemma 2 and OLMo 2 use that name for a norm of
    # attention's output, and give the MLP norms of its own.
    if name == "post_attention_layernorm" and any(other.endswith("_feedforward_layernorm") for other in siblings):
        return "attention_norm"
    return role


def role_outside(name: str) -> str | None:
    """The role of a parameter outside the blocks, by its name without `.weight` or `.bias`; None when not known."""
    return _first_match(_OUTSIDE, name)


GATED_QUERIES = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Model types whose `q_proj` makes a query and a gate for attention's output, head by head."""

FUSED_ROWS: dict[tuple[str, str], tuple[str, ...]] = {
    ("gpt2", "c_attn"): ("attention_query", "attention_key", "attention_value"),
    ("phi3", "qkv_proj"): ("attention_query", "attention_key", "attention_value"),
    ("mpt", "Wqkv"): ("attention_query", "attention_key", "attention_value"),
    ("modernbert", "Wqkv"): ("attention_query", "attention_key", "attention_value"),
    ("phi3", "gate_up_proj"): ("mlp_gate", "mlp_up"),
    ("glm", "gate_up_proj"): ("mlp_gate", "mlp_up"),
    ("glm4", "gate_up_proj"): ("mlp_gate", "mlp_up"),
    ("modernbert", "Wi"): ("mlp_gate", "mlp_up"),
}
"""The order of contiguous output rows of a fused matrix, by model type and module name.

The name alone does not tell the layout: CodeGen's `qkv_proj` is shuffled and GPT-BigCode's `c_attn` is interleaved."""


LAYERS: dict[str, tuple[str, ...]] = {
    "bert": ("tanh",),
    "camembert": ("tanh",),
    "distilbert": ("relu",),
    "electra": ("gelu",),
    "modernbert": ("gelu", "norm"),
    "mpnet": ("tanh",),
    "roberta": ("tanh",),
    "xlm-roberta": ("tanh",),
}
"""What stands between a state and the classes in a family's classification head of `transformers`, by model type."""
