"""GGUF files: their weights as plain tensors, their tokenizer as the model was trained with."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader, ReaderField
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.errors import LuthierError
from luthier.models.quiet import quiet
from luthier.models.weights import load_weights

_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""llama.cpp's names of pre-tokenizers that cut every digit off before the GPT-2 pattern."""


def load_gguf_model(file: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a GGUF file, unpacked to plain tensors.

    Raises:
        LuthierError: the file can not be read, its architecture is not known, or weights are missing.
    """
    # transformers shows the unpacking on a bar of its own that no setting switches off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model, _ = load_weights(
            transformers.AutoModelForCausalLM,
            file,
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            # Without this the weights stay packed on machines that have kernels for them, and could not be trained.
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    return model


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template, cutting text the way the file asks for.

    Raises:
        LuthierError: the file can not be read.
    """
    try:
        with quiet():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        fields = GGUFReader(file).fields
        pre_tokenizer, context_length, tokens = _metadata(fields)
        others = _named_templates(fields)
    # As with weights: a damaged file makes the readers raise anything.
    except Exception as error:
        raise LuthierError(
            f"the tokenizer can not be read: {error}",
            where=str(file),
            fix="check that the file is complete and that transformers reads its kind of tokenizer from GGUF",
        ) from error
    _leave_out_others(tokenizer, tokens)
    if pre_tokenizer in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if others:
        default = {"default": tokenizer.chat_template} if tokenizer.chat_template else {}
        tokenizer.chat_template = {**default, **others}
    if context_length:
        tokenizer.model_max_length = context_length
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder with float32 safetensors.

    Float32 holds the numbers as they unpack; half precision would round them a second time.
    """
    model = load_gguf_model(file)
    tokenizer = load_gguf_tokenizer(file)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _leave_out_others(tokenizer: Any, tokens: int) -> None:
    """Take out tokens behind those of the file: transformers adds an `<|endoftext|>` to all of GPT-2's kind."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [one for one in state["added_tokens"] if one["id"] < tokens]
    if len(own) < len(state["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**state, "added_tokens": own}))


def _metadata(fields: Mapping[str, ReaderField]) -> tuple[str | None, int | None, int]:
    """The name of the pre-tokenizer and the longest context, in tokens, where the file states them, and how many tokens it has."""
    architecture = fields["general.architecture"].contents()

    def value(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    tokens = fields["tokenizer.ggml.tokens"]
    return value("tokenizer.ggml.pre"), value(f"{architecture}.context_length"), len(tokens.data)


def _named_templates(fields: Mapping[str, ReaderField]) -> dict[str, str]:
    """The chat templates of a file beside its default, by name: transformers reads that one alone."""
    names = fields["tokenizer.chat_templates"].contents() if "tokenizer.chat_templates" in fields else []
    return {name: fields[f"tokenizer.chat_template.{name}"].contents() for name in names}
