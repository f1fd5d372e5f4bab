"""What fits into this machine's memory, by a rule of thumb: `luthier plan` estimates it from the shapes of real micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers

from luthier import machine
from luthier.models.classes import auto_class
from luthier.models.load import ModelSource
from luthier.models.tiny import tiny
from luthier.training.precision import native_bf16, pick_device

BESIDE = 3 * 2**29
"""Bytes for the process itself and the activations of a small micro-batch."""
_FULL = 16.0
"""Bytes a parameter: weights, gradients and AdamW's two moments in fp32; in bf16 with fp32 master weights as many."""
_NF4 = 0.7
"""Bytes a parameter in four bits, with scales, and embeddings that stay as they are."""


class Fit(NamedTuple):
    """What to train, so that it fits."""

    keys: Mapping[str, Any]
    """Of the recipe: `tune`, and `quantize` where the weights themselves are too large."""
    needed: int
    available: int | None
    said: str

    @property
    def fits(self) -> bool:
        """Whether even that is expected to fit."""
        return self.available is None or self.needed <= self.available


def parameters_of(source: ModelSource) -> int:
    """How many parameters a model has, by its configuration alone.

    Args:
        source: of the model.
    """
    if source.path is None:
        return sum(one.numel() for one in tiny(source.name.removeprefix("tiny:")).parameters())
    where: dict[str, Any] = {"gguf_file": source.path.name} if source.path.is_file() else {}
    folder = source.path.parent if source.path.is_file() else source.path
    code = source.trust_remote_code
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=code, **where)
    made = auto_class(config, causal=source.kind == "causal")
    with torch.device("meta"):
        return sum(one.numel() for one in made.from_config(config, trust_remote_code=code).parameters())


def fit(parameters: int, *, encoder: bool = False, available: int | None = -1) -> Fit:
    """The most that can be trained: all parameters, low-rank deltas, or these beside weights of four bits.

    Args:
        parameters: of the model.
        encoder: whether it is one, whose weights are not quantized.
        available: bytes of memory; -1: what this machine has left.
    """
    device = pick_device("auto")
    if available == -1:
        available = machine.available_bytes(device)
    width = 2 if native_bf16(device) else 4
    choices: list[tuple[str, dict[str, Any], float]] = [
        ("all parameters", {"tune": "full"}, _FULL),
        ("low-rank deltas", {"tune": "lora"}, width * 1.1),
    ]
    if not encoder:
        choices.append(("low-rank deltas beside weights of four bits", {"tune": "lora", "quantize": "nf4"}, _NF4))
    estimates = [(what, keys, int(parameters * each) + BESIDE) for what, keys, each in choices]
    fitting = [one for one in estimates if available is None or one[2] <= available]
    what, keys, needed = (fitting or estimates[-1:])[0]
    room = "memory unknown" if available is None else f"{available / 2**30:.1f} GiB free"
    return Fit(keys, needed, available, f"{what}: about {needed / 2**30:.1f} GiB, {room}")
