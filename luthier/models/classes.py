"""Which class of `transformers` loads a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def auto_class(config: Any, *, causal: bool) -> Any:
    """The auto class that loads a model whole: with its encoder of images, where its checkpoint has one.

    Args:
        config: the model's configuration, with `architectures` as they were saved.
        causal: whether the model predicts next tokens.
    """
    return getattr(transformers, auto_class_name(config.model_type, config.architectures or (), causal=causal))


def auto_class_name(model_type: str, architectures: Sequence[str], *, causal: bool) -> str:
    """The same by the words of a configuration.

    Args:
        model_type: as `transformers` calls the family.
        architectures: the classes that were saved; none where that is not known.
        causal: whether the model predicts next tokens.
    """
    if not causal:
        return "AutoModel"
    seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    saved = architectures[0] if architectures else None
    reads_images = seeing is not None and (saved == seeing or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return "AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM"
