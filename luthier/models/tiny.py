"""Tiny random models of every family and a tokenizer for them: for tests, examples and dry runs, all offline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from luthier.errors import LuthierError, nearest

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""One token a byte, then the special tokens: the size of `tiny_tokenizer`."""

MAX_POSITIONS = 512
_HEADS = 4
_KEY_VALUE_HEADS = 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class _Family(NamedTuple):
    """What a family's configuration needs beside the common settings."""

    settings: Mapping[str, Any] = {}
    grouped: bool = True
    """Whether the family has fewer key-value heads than heads."""
    inner: str = "intermediate_size"
    """What the configuration calls the width inside the MLP."""
    auto_class: str = "AutoModelForCausalLM"


_SLIDING = {"sliding_window": 64, "query_pre_attn_scalar": 8}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_DISTILBERT_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
# The default kernel for experts has no float64.
_PLAIN_EXPERTS = {"experts_implementation": "eager"}
_FAMILIES: dict[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family({"sliding_window": None}),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "gemma": _Family(),
    "gemma2": _Family(_SLIDING),
    "gemma3_text": _Family(_SLIDING),
    "smollm3": _Family(),
    "phi": _Family({"resid_pdrop": 0.0, "embd_pdrop": 0.0}, grouped=False),
    "phi3": _Family({"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2": _Family(_NO_DROPOUT, grouped=False, inner="n_inner"),
    "gpt_neox": _Family(grouped=False),
    "opt": _Family({"dropout": 0.0, "word_embed_proj_dim": 16}, grouped=False, inner="ffn_dim"),
    "bert": _Family(_NO_BERT_DROPOUT, grouped=False, auto_class="AutoModel"),
    "roberta": _Family(_NO_BERT_DROPOUT, grouped=False, auto_class="AutoModel"),
    "distilbert": _Family(_NO_DISTILBERT_DROPOUT, grouped=False, inner="hidden_dim", auto_class="AutoModel"),
    "mixtral": _Family({"num_local_experts": 4, "num_experts_per_tok": 2, **_PLAIN_EXPERTS}),
    "qwen3_moe": _Family({"num_experts": 4, "num_experts_per_tok": 2, **_PLAIN_EXPERTS, "moe_intermediate_size": 24}),
}

ARCHITECTURES = tuple(_FAMILIES)
"""What `tiny` can build."""


def _family(architecture: str) -> _Family:
    if architecture not in _FAMILIES:
        raise LuthierError(
            f"there is no tiny model of architecture `{architecture}`",
            where="tiny:<architecture>",
            fix=nearest(architecture, ARCHITECTURES),
        )
    return _FAMILIES[architecture]


def tiny_kind(architecture: str) -> Literal["causal", "encoder"]:
    """Whether the tiny model of an architecture predicts next tokens or only encodes.

    Raises:
        LuthierError: the architecture is not known.
    """
    return "causal" if _family(architecture).auto_class == "AutoModelForCausalLM" else "encoder"


def tiny(
    architecture: str = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    width: int = 32,
    vocabulary: int = VOCABULARY,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A random model of a family with 4 heads, well under a million parameters at the defaults, in evaluation mode.

    Every number is random, norms and biases too (a bias of zeros would hide a bias in the wrong place): matrices have a
    standard deviation of 1/sqrt(width), vectors move by 0.05 from where the family starts them. There is no dropout.
    The global random state is left as it was.

    Args:
        architecture: a model type of `transformers`, one of `ARCHITECTURES`.
        seed: the same seed gives the same numbers.
        layers: transformer blocks.
        width: of the hidden states; a multiple of 8.
        vocabulary: tokens; the default fits `tiny_tokenizer`.
        tied: whether embedding and head share their matrix; None leaves it to the family.
        dtype: of the weights; in float64 they are the same numbers as in float32.

    Raises:
        LuthierError: the architecture is not known, or the width can not be cut into four heads of even width.
    """
    family = _family(architecture)
    if width <= 0 or width % (2 * _HEADS):
        raise LuthierError(
            f"a width of {width} can not be cut into {_HEADS} heads of even width",
            where="width",
            fix=f"use a multiple of {2 * _HEADS}",
        )
    config = _config(architecture, family, layers=layers, width=width, vocabulary=vocabulary, tied=tied)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = getattr(transformers, family.auto_class).from_config(config, dtype=dtype)
    _randomize(model, torch.Generator().manual_seed(seed), deviation=width**-0.5)
    model.eval()
    return model


def _config(architecture: str, family: _Family, *, layers: int, width: int, vocabulary: int, tied: bool | None) -> PretrainedConfig:
    settings: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "vocab_size": vocabulary,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "bos_token_id": SPECIAL_TOKENS.index("<|im_start|>"),
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        family.inner: 3 * width,
    }
    if family.grouped:
        settings |= {"num_key_value_heads": _KEY_VALUE_HEADS, "head_dim": width // _HEADS}
    if family.settings.get("sliding_window"):
        settings["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    return transformers.AutoConfig.for_model(architecture, **settings, **family.settings)


def _randomize(model: nn.Module, generator: torch.Generator, deviation: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Summed in float32 whatever the dtype of the model, so that the numbers are the same.
            parameter.copy_(noise * deviation if parameter.dim() > 1 else parameter.float() + noise * 0.05)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, one token a byte, with ChatML's special tokens and chat template.

    Built in memory; every text survives encoding and decoding. `<|im_end|>` ends a turn and the text, padding is
    `<|endoftext|>` with id 0.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
