"""The map of a model: every parameter once, roles that mean what they say, and refusals instead of guesses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds.parts import Parts
from luthier.models.parts import map_parts
from luthier.models.tiny import ARCHITECTURES, tiny
from tests.tolerance import TINY, assert_rounded

TOKEN_IDS_BT = torch.arange(3, 23).reshape(2, 10)
SPLIT_ATTENTION = [name for name in ARCHITECTURES if name != "gpt_neox"]
GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi3"]
PLAIN_MLP = {"phi": "mlp", "gpt2": "mlp", "gpt_neox": "mlp"}


def hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKEN_IDS_BT, output_hidden_states=True).hidden_states[-1]


def change(model: nn.Module, parts: Parts, role: str, how: Callable[[Tensor], Tensor]) -> None:
    """Change every number of a role, weights and biases."""
    places = parts.select(role, tensor=None)
    assert places
    with torch.no_grad():
        for place in places:
            view = parts.view(model, place)
            view.copy_(how(view))


def outputs_of(model: nn.Module, name: str) -> Tensor:
    """What a module returns while the model runs."""
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        model(TOKEN_IDS_BT)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_number_belongs_to_exactly_one_place(architecture: str) -> None:
    """Fault 18: no parameter is missed, mixture-of-experts tensors included."""
    model = tiny(architecture)
    parts = map_parts(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for place in parts.places:
            parts.view(model, place).add_(1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.ones_like(parameter)), name
    assert len(set(parts.places)) == len(parts.places)


@pytest.mark.parametrize("architecture", SPLIT_ATTENTION)
def test_query_key_and_value_are_where_the_map_says(architecture: str) -> None:
    """Without queries all scores are zero, and without keys too; without values attention returns nothing."""
    results = {}
    for role in ("attention_query", "attention_key", "attention_value"):
        model = tiny(architecture)
        parts = map_parts(model)
        change(model, parts, role, torch.zeros_like)
        results[role] = hidden(model)
    assert_rounded(results["attention_query"], results["attention_key"], TINY)
    assert not torch.allclose(results["attention_query"], results["attention_value"], atol=1e-2)

    # Zeroed values must make the scores irrelevant, whatever queries are.
    model = tiny(architecture)
    parts = map_parts(model)
    change(model, parts, "attention_value", torch.zeros_like)
    before = hidden(model)
    change(model, parts, "attention_query", lambda view: view * 3)
    assert_rounded(hidden(model), before, TINY)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert", "roberta", "distilbert"])
def test_keys_are_told_from_queries(architecture: str) -> None:
    """Without rotary positions, one vector added to all keys moves all scores of a query alike: nothing changes."""
    model = tiny(architecture).double()
    parts = map_parts(model)
    before = hidden(model)
    for role, same in (("attention_key", True), ("attention_query", False)):
        for place in parts.select(role, tensor="bias"):
            with torch.no_grad():
                parts.view(model, place).add_(1)
        assert torch.allclose(hidden(model), before, atol=1e-5) == same


@pytest.mark.parametrize("architecture", GATED)
def test_up_scales_a_gated_mlp_and_gate_does_not(architecture: str) -> None:
    model = tiny(architecture)
    parts = map_parts(model)
    name = f"{parts.block_modules[0]}.mlp"
    before = outputs_of(model, name)
    change(model, parts, "mlp_up", lambda view: view * 2)
    torch.testing.assert_close(outputs_of(model, name), before * 2)

    change(model, parts, "mlp_up", lambda view: view / 2)
    change(model, parts, "mlp_gate", lambda view: view * 2)
    assert not torch.allclose(outputs_of(model, name), before * 2, rtol=1e-2)


@pytest.mark.parametrize("architecture", PLAIN_MLP)
def test_down_scales_a_plain_mlp(architecture: str) -> None:
    model = tiny(architecture)
    parts = map_parts(model)
    name = f"{parts.block_modules[0]}.{PLAIN_MLP[architecture]}"
    before = outputs_of(model, name)
    change(model, parts, "mlp_down", lambda view: view * 2)
    torch.testing.assert_close(outputs_of(model, name), before * 2)


def test_gpt2_slices_are_columns_of_the_fused_matrix() -> None:
    model = tiny("gpt2")
    parts = map_parts(model)
    fused = model.transformer.h[1].attn.c_attn
    places = parts.select("attention", blocks=[1])
    assert [(place.role, place.start, place.stop) for place in places] == [
        ("attention_query", 0, 32),
        ("attention_key", 32, 64),
        ("attention_value", 64, 96),
        ("attention_output", None, None),
    ]
    assert parts.transposed >= {"transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_fc"}
    assert torch.equal(parts.view(model, places[0]), fused.weight[:, :32].T)
    assert torch.equal(parts.view(model, places[1]), fused.weight[:, 32:64].T)
    assert parts.parameter(model, places[0]) is fused.weight
    assert parts.module(model, places[0]) is fused
    biases = parts.select("attention_value", blocks=[1], tensor="bias")
    assert torch.equal(parts.view(model, biases[0]), fused.bias[64:])
    whole = parts.view(model, places[3])
    assert torch.equal(whole, model.transformer.h[1].attn.c_proj.weight.T)


def test_phi3_slices_follow_grouped_heads() -> None:
    parts = map_parts(tiny("phi3"))
    rows = {place.role: (place.start, place.stop) for place in parts.select("linear", blocks=[0])}
    assert rows == {
        "attention_query": (0, 32),
        "attention_key": (32, 48),
        "attention_value": (48, 64),
        "attention_output": (None, None),
        "mlp_gate": (0, 96),
        "mlp_up": (96, 192),
        "mlp_down": (None, None),
    }


def test_interleaved_attention_stays_one_matrix() -> None:
    """GPT-NeoX interleaves by head and CodeGen by slices of its training machines: no contiguous rows are queries."""
    codegen = transformers.CodeGenConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, rotary_dim=8)
    for model in (tiny("gpt_neox"), transformers.AutoModelForCausalLM.from_config(codegen)):
        parts = map_parts(model)
        roles = Counter(place.role for place in parts.select("attention"))
        assert roles == {"attention_query_key_value": 2, "attention_output": 2}
        assert all(place.start is None for place in parts.places)


def test_a_gradient_flows_through_a_view() -> None:
    model = tiny("gpt2")
    parts = map_parts(model)
    place = parts.select("attention_key", blocks=[0])[0]
    parts.view(model, place).sum().backward()
    gradient = model.transformer.h[0].attn.c_attn.weight.grad
    assert gradient is not None
    assert gradient.sum() == 32 * 32
    assert gradient[:, 32:64].sum() == 32 * 32


def roles_of(parts: Parts, block: int | None) -> dict[str, str]:
    prefix = "" if block is None else f"{parts.block_modules[block]}."
    return {place.parameter.removeprefix(prefix): place.role for place in parts.by_block(block)}


def test_the_norm_after_attention_is_told_from_the_norm_before_the_mlp() -> None:
    llama = roles_of(map_parts(tiny("llama")), 0)
    assert llama["input_layernorm.weight"] == "attention_norm"
    assert llama["post_attention_layernorm.weight"] == "mlp_norm"
    gemma = roles_of(map_parts(tiny("gemma2")), 0)
    assert [gemma[name] for name in gemma if name.endswith("layernorm.weight")] == [
        "attention_norm",
        "attention_norm",
        "mlp_norm",
        "mlp_norm",
    ]


def test_what_stands_outside_the_blocks() -> None:
    assert roles_of(map_parts(tiny("llama", tied=False)), None) == {
        "model.embed_tokens.weight": "embedding",
        "model.norm.weight": "final_norm",
        "lm_head.weight": "head",
    }
    opt = roles_of(map_parts(tiny("opt")), None)
    assert opt["model.decoder.embed_positions.weight"] == "position_embedding"
    assert opt["model.decoder.project_in.weight"] == opt["model.decoder.project_out.weight"] == "other"
    assert opt["model.decoder.final_layer_norm.weight"] == "final_norm"
    phi = roles_of(map_parts(tiny("phi")), None)
    assert phi["lm_head.bias"] == "head"
    bert = roles_of(map_parts(tiny("bert")), None)
    assert bert["embeddings.LayerNorm.bias"] == "other_norm"
    assert bert["embeddings.token_type_embeddings.weight"] == bert["pooler.dense.weight"] == "other"


@pytest.mark.parametrize(
    ("architecture", "backbone", "embedding", "head", "causal"),
    [
        ("llama", "model", "model.embed_tokens", "lm_head", True),
        ("gpt2", "transformer", "transformer.wte", "lm_head", True),
        ("gpt_neox", "gpt_neox", "gpt_neox.embed_in", "lm_head", True),
        ("opt", "model.decoder", "model.decoder.embed_tokens", "lm_head", True),
        ("bert", "", "embeddings.word_embeddings", "", False),
        ("distilbert", "", "embeddings.word_embeddings", "", False),
    ],
)
def test_landmarks(architecture: str, backbone: str, embedding: str, head: str, causal: bool) -> None:
    model = tiny(architecture, layers=3, width=48)
    parts = map_parts(model)
    assert (parts.backbone, parts.embedding, parts.head, parts.causal) == (backbone, embedding, head, causal)
    assert (parts.blocks, parts.width, parts.heads, parts.head_width) == (3, 48, 4, 12)
    assert parts.vocabulary == 259
    assert [type(model.get_submodule(name)) for name in parts.block_modules] == [type(parts_block(model, parts))] * 3


def parts_block(model: nn.Module, parts: Parts) -> nn.Module:
    return model.get_submodule(parts.block_modules[0])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_the_backbone_feeds_the_head(architecture: str) -> None:
    model = tiny(architecture)
    parts = map_parts(model)
    with torch.no_grad():
        last = model.get_submodule(parts.backbone)(input_ids=TOKEN_IDS_BT).last_hidden_state
        logits = model(TOKEN_IDS_BT).logits
        found = model.get_submodule(parts.head)(last)
    if architecture == "gemma2":
        cap = model.config.final_logit_softcapping
        found = torch.tanh(found / cap) * cap
    torch.testing.assert_close(found, logits)


def test_grouped_heads_are_counted() -> None:
    assert map_parts(tiny("llama")).key_value_heads == 2
    assert map_parts(tiny("gpt2")).key_value_heads == 4
    falcon = transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    assert map_parts(transformers.AutoModelForCausalLM.from_config(falcon)).key_value_heads == 1


def test_tied_tensors_stand_once_under_the_embedding() -> None:
    """Fault 22: a tied head is the embedding, in the map as in memory."""
    parts = map_parts(tiny("llama", tied=True))
    assert parts.ties == {"lm_head": "model.embed_tokens"}
    assert not parts.select("head")
    untied = map_parts(tiny("llama", tied=False))
    assert untied.ties == {}
    assert [place.module for place in untied.select("head")] == ["lm_head"]


def test_a_masked_language_model_has_two_ties() -> None:
    config = tiny("bert").config
    config.tie_word_embeddings = True
    parts = map_parts(transformers.AutoModelForMaskedLM.from_config(config))
    assert parts.ties == {
        "cls.predictions.decoder": "bert.embeddings.word_embeddings",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert parts.backbone == "bert"
    assert [place.parameter for place in parts.select("head", tensor="bias")] == ["cls.predictions.bias"]


def test_a_classifier_has_a_head() -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(tiny("llama").config)
    parts = map_parts(model)
    assert [place.module for place in parts.select("head")] == ["score"]
    assert not parts.causal


def test_experts_and_routers_are_seen() -> None:
    """Fault 18: three-dimensional expert tensors have a role and can be selected."""
    model = tiny("mixtral")
    parts = map_parts(model)
    experts = parts.select("expert", blocks=[0])
    assert [place.tensor for place in experts] == ["gate_up_proj", "down_proj"]
    assert parts.view(model, experts[0]).shape == (4, 192, 32)
    assert [place.module for place in parts.select("router")] == [
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]


def rename(module: nn.Module, old: str, new: str) -> None:
    child = module.get_submodule(old)
    delattr(module, old)
    setattr(module, new, child)


def test_unknown_names_are_resolved_by_shape_where_certain() -> None:
    model = tiny("phi")
    for block in model.model.layers:
        rename(block.mlp, "fc1", "widen")
        rename(block.mlp, "fc2", "narrow")
        rename(block, "input_layernorm", "balance")
    roles = roles_of(map_parts(model), 1)
    assert roles["mlp.widen.weight"] == roles["mlp.widen.bias"] == "mlp_up"
    assert roles["mlp.narrow.weight"] == "mlp_down"
    assert roles["balance.bias"] == "other_norm"


def test_unknown_names_that_shapes_do_not_explain_are_linear_maps_or_others() -> None:
    model = tiny("llama")
    rename(model.model.layers[1].self_attn, "v_proj", "mystery")
    for name in ("gate_proj", "up_proj", "down_proj"):
        rename(model.model.layers[0].mlp, name, f"{name[0]}_linear")
    model.model.layers[0].mlp.riddle = nn.Parameter(torch.zeros(3))
    model.model.layers[0].mlp.convolution = nn.Conv1d(2, 2, 3)
    model.model.outside = nn.Linear(2, 2)
    parts = map_parts(model)
    other = [place.parameter for place in parts.select("linear_other", tensor=None)]
    mlp = [f"model.layers.0.mlp.{name}_linear.weight" for name in "gud"]
    assert sorted(other) == [*sorted(mlp), "model.layers.1.self_attn.mystery.weight"]
    assert set(parts.select("linear")) > set(parts.select("linear_other"))
    names = [
        "layers.0.mlp.riddle",
        "layers.0.mlp.convolution.weight",
        "layers.0.mlp.convolution.bias",
        "outside.weight",
        "outside.bias",
    ]
    assert {place.parameter for place in parts.select("other", tensor=None)} == {f"model.{name}" for name in names}
    assert parts.unknown() == [
        "linear maps that are `linear_other`: 4 (mlp.g_linear, mlp.u_linear, mlp.d_linear, self_attn.mystery)",
        "parameters that are `other`: 5 (mlp.riddle, mlp.convolution, mlp.convolution.bias, model.outside, ...)",
    ]
    assert not map_parts(tiny("llama")).unknown()


def test_a_narrow_detour_is_no_mlp() -> None:
    """Two mirrored matrices are an MLP only where they widen the hidden states and the block has no other."""
    model = tiny("phi")
    for block in model.model.layers:
        rename(block.mlp, "fc1", "widen")
        rename(block.mlp, "fc2", "narrow")
        block.mlp.widen, block.mlp.narrow = nn.Linear(32, 8), nn.Linear(8, 32)
    assert roles_of(map_parts(model), 1)["mlp.widen.weight"] == "linear_other"
    second = tiny("llama")
    for block in second.model.layers:
        block.widen, block.narrow = nn.Linear(32, 96), nn.Linear(96, 32)
    roles = roles_of(map_parts(second), 0)
    assert {roles[f"{name}.{tensor}"] for name in ("widen", "narrow") for tensor in ("weight", "bias")} == {"linear_other"}


def test_head_counts_that_do_not_explain_the_shapes_name_no_heads() -> None:
    model = tiny("llama")
    model.config.num_key_value_heads = 4
    roles = roles_of(map_parts(model), 0)
    assert [roles[f"self_attn.{name}_proj.weight"] for name in "qkvo"] == [
        "attention_query",
        "linear_other",
        "linear_other",
        "attention_output",
    ]
    fused = tiny("phi3")
    fused.config.num_key_value_heads = 4
    assert roles_of(map_parts(fused), 0)["self_attn.qkv_proj.weight"] == "attention_query_key_value"


def test_what_needs_a_role_that_a_model_lacks_is_told_what_it_has(engine: Callable[..., object]) -> None:
    with pytest.raises(
        LuthierError, match=r"finds no place with the module types mixer_input(.|\n)*this model has embedding, attention_q"
    ):
        engine({"lora": {"target_modules": ["mixer_input"]}})


def test_encoder_decoder_models_are_refused() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    with pytest.raises(LuthierError, match="encoder-decoder"):
        map_parts(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_one_list_of_blocks_is_refused() -> None:
    model = tiny("llama")
    # LongCat counts two layers in a block.
    model.config.num_hidden_layers = 4
    assert map_parts(model).block_modules == ("model.layers.0", "model.layers.1")
    model.model.others = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(LuthierError, match=r"not one list of 4 modules(.|\n)*model\.layers\n *model\.others"):
        map_parts(model)
    model.config.num_hidden_layers, model.model.others = 2, nn.ModuleList([nn.Linear(2, 2)])
    assert map_parts(model).blocks == 2


def test_what_is_no_language_model_is_refused() -> None:
    model = tiny("llama")
    model.config.get_text_config = lambda: SimpleNamespace(hidden_size=32)
    with pytest.raises(LuthierError, match="its configuration has no vocab_size"):
        map_parts(model)
