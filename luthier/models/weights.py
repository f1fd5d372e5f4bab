"""Weights into a model, all of them: a checkpoint that lacks some would leave the rest random."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from luthier.errors import LuthierError


def load_weights(auto_class: Any, path: Path, folder: Path, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """Load a model with an auto class of `transformers`, in evaluation mode.

    Args:
        auto_class: `AutoModelForCausalLM` or `AutoModel`.
        path: what errors name: the folder or the file.
        folder: what `from_pretrained` reads.
        options: for `from_pretrained`.

    Returns:
        The model, and the names of tensors of the checkpoint that have no place in it. An encoder that was saved
        without its pooler comes without one.

    Raises:
        LuthierError: the files can not be read, or they lack weights of the model or hold some that are not finite.
    """
    try:
        loaded: Any = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    # The readers of configurations, safetensors and GGUF raise whatever a damaged file makes them stumble over.
    except Exception as error:
        raise LuthierError(
            f"the model can not be loaded: {error}",
            where=str(path),
            fix="check that its files are complete and of an architecture that transformers can load",
        ) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
    elif missing:
        raise LuthierError(
            f"the checkpoint lacks weights of {type(model).__name__}: {', '.join(missing[:5])}",
            where=str(path),
            fix="use a checkpoint of this class of model; missing weights would be random",
        )
    broken = [name for name, values in model.named_parameters() if not _finite(values)]
    if broken:
        raise LuthierError(
            f"weights are not finite numbers: {', '.join(broken[:5])}", where=str(path), fix="copy the model again, or use another"
        )
    return model.eval(), sorted(report["unexpected_keys"])


def _finite(values: torch.Tensor) -> bool:
    # The ends of the range tell it in one pass and without a mask of the same size; not-a-number wins both ends.
    if not values.numel() or not values.is_floating_point() or values.is_meta:
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(values.detach()))
