"""A tuned model as one GGUF file, the format of llama.cpp and what builds on it, read back and compared before anyone relies on it.

The architectures here are those whose tensors need no more than names, and for Llama another order of rotary rows. Others
are refused: a file that loads and answers wrongly is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier.delta.sources import live
from luthier.errors import LuthierError, nearest
from luthier.export import gguf_quantize
from luthier.export.folder import new_file
from luthier.export.gguf_quantize import BITS
from luthier.export.gguf_tokenizer import add_tokenizer, check_tokenizer
from luthier.export.model import PROBES, divergence, merged, outputs
from luthier.generation.generate import context_of, generate
from luthier.models.convert import load_gguf_model
from luthier.models.parts import map_parts
from luthier.rows.encode import encode_prompt
from luthier.rows.shapes import Row
from luthier.tune import Tune


class _Architecture(NamedTuple):
    """How llama.cpp names an architecture, and which rows of query and key it turns together."""

    number: gguf.MODEL_ARCH
    turns_neighbors: bool
    """Rotary rows 2i and 2i+1 turn together, where transformers turns rows i and i + head width / 2."""


ARCHITECTURES = {
    "llama": _Architecture(gguf.MODEL_ARCH.LLAMA, True),
    # llama.cpp has no Mistral of its own: without a sliding window it computes what Llama does.
    "mistral": _Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": _Architecture(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": _Architecture(gguf.MODEL_ARCH.QWEN3, False),
}
"""By the model type of the configuration."""

WEIGHTS = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Types of matrices in a file. Vectors (norms and biases) are always float32."""
_DTYPES = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_OF_DTYPE = {dtype: kind.name.lower() for kind, dtype in _DTYPES.items()}

_BLOCK = 32
"""Numbers that share a scale in Q8_0."""
_ROUNDING_Q8 = (0.5 + 127 / 2**11) / 127
"""The largest error of Q8_0, as a share of the largest number of its block: half a step of 1/127, and what the scale loses
as a float16 (a share of 2^-11 of up to 127 steps)."""
LARGEST_DIVERGENCE = 0.05
"""Nats a token that Q8_0 may cost on `PROBES`; SmolLM2-135M-Instruct with an adapter loses 0.003."""
_NEW_TOKENS = 8
QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
    "Translate into German: The library closes at six.",
    "What is 17 times 23?",
    "List three uses of a paper clip.",
    "Who wrote Romeo and Juliet?",
    "Summarize: The meeting was moved from Monday to Thursday, because the speaker fell ill.",
    "Write a Python function that reverses a string.",
    "What is the difference between weather and climate?",
    "Correct the grammar: She don't likes apples.",
    "Give me a recipe with eggs and spinach.",
    "Is this review good or bad? The battery died after an hour.",
    "Name the planets of the solar system.",
    "How do I cancel my order?",
    "Rewrite politely: Send me the report now.",
    "What does HTTP status 404 mean?",
    "Convert 68 degrees Fahrenheit to Celsius.",
    "Finish the sentence: Once upon a time",
    "Return the name in this text as JSON: Ada Lovelace was born in London.",
)
"""What a live model and a file are both asked, for the share of tokens that are the same."""


def export_gguf(tune: Tune, tokenizer: PreTrainedTokenizerBase, file: str | Path, *, weights: str = "auto") -> dict[str, Any]:
    """Write the merged model and its tokenizer as one GGUF file, and check it by loading it.

    Args:
        tune: the tuned model; afterwards it is as it was.
        tokenizer: a byte-level BPE; its chat template and the ids that end a turn go into the file.
        file: ends in `.gguf` and must not exist; it appears when everything has been checked.
        weights: `f32`, `f16`, `bf16`, `q8_0` (8 bits, one scale for 32 numbers), `auto` for the type of the model, or one of
            `gguf_quantize.BITS`, which `llama-cpp-python` makes.

    Returns:
        `weights`, `bytes`, `max_logit_difference` and `kl`, the mean KL(live, file) in nats a token, both on `PROBES`;
        and `same_greedy_tokens`, the share of greedily generated tokens that are the same, of the first 8 of the answers to
        `QUESTIONS` (None where the model reads too little for any of them).

    Raises:
        LuthierError: the file exists, the architecture, its options or the tokenizer have no exact place in GGUF, or
            what was read back differs: token ids at all, weights by more than their type rounds, logits by more than
            half the digits of the model's type (Q8_0: by more than `LARGEST_DIVERGENCE`). What fewer bits cost in
            logits is told, and never refused: who asks for 2 bits knows.
    """
    file = Path(file)
    weights = _weights(tune, weights)
    if weights in BITS:
        gguf_quantize.library()
    architecture = _architecture(tune)
    if file.suffix != ".gguf":
        raise LuthierError(f"`{file.name}` does not end in .gguf", where="export_gguf", fix=f"name it {file.stem}.gguf")
    ids = [tokenizer(text)["input_ids"] for text in PROBES]
    with merged(tune), new_file(file) as beside:
        if weights in BITS:
            with TemporaryDirectory(dir=beside.parent, prefix=".whole-") as place:
                whole = Path(place) / "whole.gguf"
                _write(tune, tokenizer, whole, file.stem, architecture, _weights(tune, "auto"))
                gguf_quantize.quantize(whole, beside, weights)
        else:
            _write(tune, tokenizer, beside, file.stem, architecture, weights)
        check_tokenizer(tokenizer, beside)
        found = _check_model(tune, tokenizer, beside, ids, weights)
        size = beside.stat().st_size
    return {"weights": weights, "bytes": size, **found}


def _write(
    tune: Tune, tokenizer: PreTrainedTokenizerBase, file: Path, title: str, architecture: _Architecture, weights: str
) -> None:
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture.number], use_temp_file=True)
    writer.add_name(title)
    writer.add_file_type(WEIGHTS[weights][1])
    _add_shape(writer, tune)
    add_tokenizer(writer, tokenizer, tune)
    for name, values in _tensors(tune, architecture):
        kind = _type(values, weights)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(tune: Tune, weights: str) -> str:
    if weights == "auto":
        dtype = next(tune.model.parameters()).dtype
        if dtype not in _OF_DTYPE:
            raise LuthierError(f"GGUF has no weights of type {dtype}", where="weights", fix="choose weights: f32")
        return _OF_DTYPE[dtype]
    if weights not in WEIGHTS and weights not in BITS:
        fix = nearest(weights, ["auto", *WEIGHTS, *BITS])
        raise LuthierError(f"there are no weights `{weights}`", where="weights", fix=fix)
    return weights


def _architecture(tune: Tune) -> _Architecture:
    """Refuse what GGUF would hold inexactly, or what no reader of it would compute.

    Raises:
        LuthierError: an architecture that is not in `ARCHITECTURES`, scaled rotary embeddings or a sliding window.
    """
    config: Any = tune.model.config
    if config.model_type not in ARCHITECTURES:
        raise LuthierError(
            f"the architecture `{config.model_type}` has no GGUF export",
            where=type(tune.model).__name__,
            fix=f"export the model, and convert it with llama.cpp's own converter; here are: {', '.join(ARCHITECTURES)}",
        )
    rotary = config.rope_parameters.get("rope_type", "default")
    # Qwen2 and Qwen3 state a window that they do not use unless they also say so.
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if rotary != "default" or window is not None:
        what = f"rotary embeddings of type `{rotary}`" if rotary != "default" else f"a sliding window of {window} tokens"
        raise LuthierError(
            f"{what} cannot be checked in GGUF",
            where="config.json",
            fix="export the model, and convert it with llama.cpp's own converter",
        )
    return ARCHITECTURES[config.model_type]


def _add_shape(writer: gguf.GGUFWriter, tune: Tune) -> None:
    config: Any = tune.model.config
    writer.add_block_count(tune.parts.blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(tune.parts.width)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(tune.parts.heads)
    writer.add_head_count_kv(tune.parts.key_value_heads)
    writer.add_key_length(tune.parts.head_width)
    writer.add_value_length(tune.parts.head_width)
    writer.add_rope_dimension_count(tune.parts.head_width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(tune.parts.vocabulary)


def _tensors(tune: Tune, architecture: _Architecture) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its name in GGUF, as float32; of tied ones, the first."""
    names = gguf.get_tensor_name_map(architecture.number, tune.parts.blocks)
    heads = {"attention_query": tune.parts.heads, "attention_key": tune.parts.key_value_heads}
    turned = {place.parameter: heads[place.role] for place in tune.parts.places if place.role in heads}
    for name, tensor in live(tune.model).items():
        if name.rpartition(".")[0] in tune.parts.ties:
            continue
        here = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if here is None:
            raise LuthierError(
                f"`{name}` has no place in GGUF's {gguf.MODEL_ARCH_NAMES[architecture.number]}",
                where=type(tune.model).__name__,
                fix="export the model, and convert it with llama.cpp's own converter",
            )
        values = tensor.float().cpu()
        if architecture.turns_neighbors and name in turned:
            values = _neighbors(values, turned[name])
        yield here, values.contiguous().numpy()


def _neighbors(weight: Tensor, heads: int) -> Tensor:
    """Rows i and i + head width / 2 of every head, made rows 2i and 2i + 1."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _type(values: np.ndarray, weights: str) -> Type:
    """The type of a tensor: vectors keep every digit, and rows that no block of Q8_0 divides become float16."""
    if values.ndim == 1:
        return Type.F32
    return Type.F16 if weights == "q8_0" and values.shape[-1] % _BLOCK else WEIGHTS[weights][0]


def _check_model(tune: Tune, tokenizer: PreTrainedTokenizerBase, file: Path, ids: list[list[int]], weights: str) -> dict[str, Any]:
    """Read the file and compare it with the live model: weights, logits, and answers."""
    first = next(tune.model.parameters())
    reloaded: Any = load_gguf_model(file, dtype=first.dtype).to(first.device)  # type: ignore[arg-type]
    _check_weights(live(tune.model), live(reloaded), weights)
    expected, found = outputs(tune.model, ids), outputs(reloaded, ids)
    difference = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    kl = divergence(expected, found)
    if not _near(difference, kl, weights, first.dtype, expected):
        raise LuthierError(
            f"the file gives other outputs: logits differ by up to {difference:g}, distributions by {kl:g} nats a token",
            where=type(tune.model).__name__,
            fix="choose weights with more digits; where these are f32, GGUF does not hold this architecture as it is",
        )
    same = _same_tokens(tune, Tune(reloaded, map_parts(reloaded)), tokenizer)
    return {"max_logit_difference": difference, "kl": kl, "same_greedy_tokens": same}


def _near(difference: float, kl: float, weights: str, dtype: torch.dtype, expected: list[Tensor]) -> bool:
    """Whether logits and distributions differ by no more than the weights explain."""
    if weights in BITS:
        return math.isfinite(difference)
    if weights == "q8_0":
        return kl <= LARGEST_DIVERGENCE
    precision = max(torch.finfo(one).eps for one in (dtype, _DTYPES[WEIGHTS[weights][0]]))
    return bool(difference <= precision**0.5 * max(1.0, *(float(one.abs().max()) for one in expected)))


def _check_weights(expected: dict[str, Tensor], found: dict[str, Tensor], weights: str) -> None:
    """Compare every tensor with what its type makes of it."""
    wrong = [name for name, values in expected.items() if name not in found or not _rounds_to(values, found[name], weights)]
    if wrong:
        raise LuthierError(
            f"{len(wrong)} of {len(expected)} tensors differ after saving and loading by more than {weights} rounds",
            where=wrong[0],
            fix="GGUF does not hold this model as it is; export the model",
        )


def _rounds_to(values: Tensor, found: Tensor, weights: str) -> bool:
    """Whether a tensor is what its type in the file, and then the type it is read as, make of it."""
    if values.shape != found.shape:
        return False
    if weights in BITS:
        return gguf_quantize.rounds_to(values, found, weights)
    exact, read = values.float().cpu(), found.float().cpu()
    kind = _type(exact.numpy(), weights)
    if kind == Type.Q8_0:
        largest = exact.reshape(-1, _BLOCK).abs().amax(-1, keepdim=True)
        share = _ROUNDING_Q8 + torch.finfo(found.dtype).eps
        return bool(((exact - read).reshape(-1, _BLOCK).abs() <= share * largest).all())
    return torch.equal(exact.to(_DTYPES[kind]).to(found.dtype).float(), read)


def _same_tokens(tune: Tune, other: Tune, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """The share of the greedy tokens of two models' answers to `QUESTIONS` that are the same; where an answer ends is a token, too."""
    rows = [Row("question", "prompt", {"prompt": text}, "a question", {}) for text in QUESTIONS]
    limit = context_of(tune) or math.inf
    prompts = [ids for row in rows if len(ids := encode_prompt(row, tokenizer)) + _NEW_TOKENS <= limit]
    if not prompts:
        return None
    answers: list[list[Sequence[int]]] = []
    for one in (tune, other):
        heard: list[Sequence[int]] = [()] * len(prompts)

        def hear(place: int, ids: Sequence[int], heard: list[Sequence[int]] = heard) -> bool:
            heard[place] = tuple(ids)
            return True

        generate(one, tokenizer, prompts, max_new_tokens=_NEW_TOKENS, hear=hear)
        answers.append(heard)
    pairs = [pair for left, right in zip(*answers, strict=True) for pair in _beside(left, right)]
    return sum(one == other for one, other in pairs) / len(pairs)


def _beside(left: Sequence[int], right: Sequence[int]) -> Iterator[tuple[int | None, int | None]]:
    """Tokens at the same place of two answers; None where one of them has ended."""
    length = min(_NEW_TOKENS, max(len(left), len(right)) + 1)
    return ((left[at] if at < len(left) else None, right[at] if at < len(right) else None) for at in range(length))
