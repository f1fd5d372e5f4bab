"""What embeddings do beside looking up rows."""

from __future__ import annotations

import torch
from torch import nn


def scale_of(module: nn.Module) -> float | None:
    """What an embedding multiplies its rows with (Gemma), in the type of its weight, as the module does; None: nothing."""
    scale = getattr(module, "embed_scale", None)
    return None if scale is None else float(torch.as_tensor(scale).to(module.get_parameter("weight").dtype))
