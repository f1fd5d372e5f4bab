"""A model folder in the Hugging Face form: what kind of model it holds, and whether it can be loaded safely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from luthier.errors import LuthierError
from luthier.models.classes import auto_class_name
from luthier.models.known import Kind

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
_KINDS = (("model_type", str, "text"), ("architectures", list, "a list"), ("weight_map", dict, "an object"))
"""What is read from the files of a model, and what it must be."""
_CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def has_weights(folder: Path) -> bool:
    """Whether the folder holds all safetensors files of its model."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        by_tensor = _read_json(index).get("weight_map")
        shards = set(map(str, by_tensor.values())) if isinstance(by_tensor, dict) else set()
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    return (folder / "model.safetensors").is_file()


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def has_code(folder: Path) -> bool:
    """Whether the folder holds the code its configuration refers to, if it refers to any."""
    return "auto_map" not in _read_json(folder / "config.json") or any(folder.glob("*.py"))


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> Kind:
    """The kind of model in a folder that can be loaded.

    Args:
        folder: with config.json and safetensors files.
        trust_remote_code: allow a model whose code comes with it.

    Raises:
        LuthierError: no configuration, no or incomplete safetensors, an adapter, or code that is not trusted.
    """
    if not (folder / "config.json").is_file():
        raise _no_configuration(folder)
    config = _read_json(folder / "config.json")
    _check_code(folder, config, trust_remote_code)
    if not has_weights(folder):
        raise _no_weights(folder)
    return _kind_of(folder, config)


def class_of(folder: Path, kind: Kind) -> Any:
    """The auto class of `transformers` that loads the model of a folder."""
    config = _read_json(folder / "config.json")
    name = auto_class_name(str(config.get("model_type")), config.get("architectures") or (), causal=kind == "causal")
    return getattr(transformers, name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LuthierError("the file is not JSON", where=str(path), fix=f"copy the model again ({error})") from error
    if not isinstance(content, dict):
        raise LuthierError("the file does not hold a JSON object", where=str(path), fix="copy the model again")
    for key, kind, words in _KINDS:
        if not isinstance(content.get(key) or kind(), kind):
            raise LuthierError(f"`{key}` is {content[key]!r}, not {words}", where=str(path), fix="copy the model again")
    return content


def _no_configuration(folder: Path) -> LuthierError:
    if (folder / "adapter_config.json").is_file():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "the base model"
        return LuthierError("the folder holds an adapter, not a model", where=str(folder), fix=f"name the model itself: {base}")
    files = sorted(path.name for path in folder.glob("*.gguf"))
    fix = f"name the file itself, e.g. {folder / files[0]}" if files else "name a folder that `save_pretrained` wrote"
    return LuthierError("the folder holds no model: config.json is missing", where=str(folder), fix=fix)


def _no_weights(folder: Path) -> LuthierError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return LuthierError(
            f"the weights are pickled ({', '.join(pickles[:3])}), and unpickling runs whatever code the file holds",
            where=str(folder),
            fix="if you trust the file, convert it once with transformers: `from_pretrained(folder)`, then "
            "`save_pretrained(new_folder)`, which writes safetensors",
        )
    missing = "some files that model.safetensors.index.json names" if list(folder.glob("*.index.json")) else "model.safetensors"
    return LuthierError(f"the weights are incomplete: {missing} missing", where=str(folder), fix="copy the model again")


def _check_code(folder: Path, config: dict[str, Any], trusted: bool) -> None:
    built_in = config.get("model_type") in CONFIG_MAPPING
    if built_in or (trusted and "auto_map" in config):
        return
    if "auto_map" in config:
        raise LuthierError(
            f"the model `{config.get('model_type')}` runs code that comes with it",
            where=str(folder / "config.json"),
            fix="read that code; if you trust it, set `trust_remote_code: true`",
        )
    raise LuthierError(
        f"this version of transformers does not know the model type `{config.get('model_type')}`",
        where=str(folder / "config.json"),
        fix="upgrade transformers, or use a model of a type it knows",
    )


def _kind_of(folder: Path, config: dict[str, Any]) -> Kind:
    classes = config.get("architectures") or []
    if classes:
        return "causal" if str(classes[0]).endswith(_CAUSAL_CLASSES) else "encoder"
    model_type = config.get("model_type")
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "causal"
    raise LuthierError(
        f"a model of type `{model_type}` is neither a causal language model nor an encoder",
        where=str(folder / "config.json"),
        fix="use a causal language model",
    )
