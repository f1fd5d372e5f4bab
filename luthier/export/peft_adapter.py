"""What every PEFT adapter is made of: a configuration and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes before the name of a module."""


class Adapter(NamedTuple):
    """One technique in PEFT's form."""

    config: Mapping[str, Any]
    """What adapter_config.json holds beside what all adapters say: `peft_type` and its options."""
    tensors: Mapping[str, Tensor]
    """By PEFT's names."""
    facts: Mapping[str, Any]
    """What the user hears of it."""


def write_adapter(folder: Path, adapter: Adapter, metadata: Mapping[str, str], dtype: torch.dtype | None = None) -> None:
    """Write an adapter's two files into a folder, with tensors in some type."""
    tensors = {name: values.detach().to("cpu", dtype).contiguous() for name, values in adapter.tensors.items()}
    save_file(tensors, folder / TENSORS, {"format": "pt", **metadata})
    (folder / CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
