"""The tokenizer of a GGUF file: tokens, merges, the way text is cut before them, chat template and the ids that end a turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from luthier.errors import LuthierError
from luthier.export.model import CONVERSATION, PROBES
from luthier.models.convert import load_gguf_tokenizer
from luthier.rows.encode import encode_prompt, end_of_turn_ids
from luthier.rows.template import choice_of, give, templates_of, text_of
from luthier.tune import Tune

_SPLITS = {
    PRETOKENIZE_REGEX: "qwen2",
    # Llama 3 cuts numbers into groups of up to three digits, and is the same elsewhere.
    PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
}
"""llama.cpp's names of the patterns that cut text before merging."""


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, tune: Tune) -> None:
    """Add a byte-level BPE tokenizer. Ids that only the model has become unused tokens.

    Raises:
        LuthierError: another kind of tokenizer, one that cuts text in a way llama.cpp has no name for, one with more
            tokens than the model, or with added tokens that swallow what stands beside them.
    """
    state = _state(tokenizer)
    _check_added(state, tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(state, tokenizer))
    tokens, types = _tokens(tokenizer, tune.parts.vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    _add_special(writer, tokenizer, tune)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Read the tokenizer of the file and compare ids on `PROBES` and around every added token, templates and a conversation.

    Raises:
        LuthierError: any of them differs.
    """
    reloaded = load_gguf_tokenizer(file)
    give(reloaded, choice_of(tokenizer))
    written = {one["name"]: one["template"] for one in _templates(tokenizer)}
    if written != templates_of(reloaded):
        raise LuthierError(
            "the chat templates differ when they are read from the file: " + ", ".join(written),
            where=type(tokenizer).__name__,
            fix="call them by names of letters and digits, with `_` between",
        )
    if _seen(tokenizer) != _seen(reloaded):
        raise LuthierError(
            "the tokenizer cuts text differently when it is read from the file",
            where=type(tokenizer).__name__,
            fix="export the model, and convert it with llama.cpp's own converter",
        )


def _seen(tokenizer: Any) -> list[Any]:
    ids = [tokenizer(text)["input_ids"] for text in (*PROBES, *_around_added(tokenizer))]
    return [*ids, list(encode_prompt(CONVERSATION, tokenizer))] if tokenizer.chat_template else ids


def _around_added(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts in which every added token stands among spaces, within a word, and twice."""
    added = map(str, tokenizer.added_tokens_decoder.values())
    return [text for one in added for text in (f"a {one} b", f"a{one}b", f" {one}{one}  ")]


def _check_added(state: dict[str, Any], tokenizer: Any) -> None:
    """Refuse tokens that take more than their own text, or are looked for in another text: readers of GGUF know neither."""
    for token in tokenizer.added_tokens_decoder.values():
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if getattr(token, flag)]
        flags += ["normalized"] if token.normalized and state.get("normalizer") is not None else []
        if flags:
            raise LuthierError(
                f"GGUF cannot hold that the added token `{token}` is {' and '.join(flags)}: readers would cut text otherwise",
                where=f"{type(tokenizer).__name__}: added tokens",
                fix="export the model, or train with a tokenizer whose added tokens stand for their own text alone",
            )


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """All chat templates by name. Readers of a file without a default would take one of their own, so what was chosen is it."""
    held = templates_of(tokenizer)
    if held and "default" not in held:
        held["default"] = text_of(tokenizer, choice_of(tokenizer).name)
    return [{"name": name, "template": text} for name, text in held.items()]


def _state(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = state.get("model", {})
    # SentencePiece's scores are not in the tokenizer's file, and llama.cpp merges by them. Without merges readers take
    # the file for one of SentencePiece.
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model["merges"]:
        raise LuthierError(
            "this kind of tokenizer has no GGUF export: it is no byte-level BPE with merges",
            where=type(tokenizer).__name__,
            fix="export the model, and convert it with llama.cpp's own converter",
        )
    return state


def _pre_tokenizer(state: dict[str, Any], tokenizer: Any) -> str:
    """llama.cpp's name of the way text is cut before merging, known by what it does."""
    outer = state["pre_tokenizer"] or {}
    steps = outer.get("pretokenizers", [outer])
    last = steps[-1] if steps[-1].get("type") == "ByteLevel" and not steps[-1]["add_prefix_space"] else {}
    match [step.get("type") for step in steps[:-1]]:
        case [] if last.get("use_regex"):
            return "gpt-2"
        case ["Digits"] if last.get("use_regex") and steps[0]["individual_digits"]:
            return "smollm"
        case ["Split"] if last and not last["use_regex"] and steps[0]["pattern"].get("Regex") in _SPLITS:
            return _SPLITS[steps[0]["pattern"]["Regex"]]
    raise LuthierError(
        "llama.cpp has no name that luthier knows for the way this tokenizer cuts text",
        where=f"{type(tokenizer).__name__}: pre_tokenizer",
        fix="export the model, and convert it with llama.cpp's own converter",
    )


def _tokens(tokenizer: Any, vocabulary: int) -> tuple[list[str], list[int]]:
    """Every id's text and type."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= vocabulary:
        raise LuthierError(
            f"the tokenizer has ids up to {max(texts)}, and the model only {vocabulary} tokens",
            where=type(tokenizer).__name__,
            fix="use the tokenizer that belongs to the model",
        )
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    types: list[int] = []
    for number in range(vocabulary):
        tokens.append(texts.get(number, f"[PAD{number}]"))
        if number not in texts:
            types.append(gguf.TokenType.UNUSED)
        elif number not in added:
            types.append(gguf.TokenType.NORMAL)
        else:
            types.append(gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED)
    return tokens, types


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any, tune: Tune) -> None:
    ends: list[int | None] = [*end_of_turn_ids(tokenizer)]
    configured = getattr(getattr(tune.model, "generation_config", None), "eos_token_id", None)
    ends += configured if isinstance(configured, list) else [configured]
    turn = next((one for one in ends if one is not None and one != tokenizer.eos_token_id), None)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_eot_token_id, turn),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    written = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(written[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(written[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(_templates(tokenizer))
