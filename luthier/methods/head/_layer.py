"""What reads numbers from a state: a linear map, behind the layer that classification heads of the model's family have before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Services, Tensors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": functional.relu, "gelu": functional.gelu}
"""By what `Parts.layer` calls them; the layer's tensors bear the name of its activation."""
SPREAD = 0.02
"""Standard deviation of a new layer, as encoders are drawn, where the model's configuration does not say."""


def start(numbers: int, services: Services) -> Tensors:
    """Tensors that read so many numbers from a state, which are all 0 at the start.

    A causal model gets a linear map without a bias, an encoder one with a bias and its family's layer before it: the model's own pooler
    where it has one, else a new one. A layer before a norm has no bias, as that of ModernBERT.
    """
    if services.parts.causal:
        return {"weight": torch.zeros(numbers, services.parts.output_width)}
    return {**_linear(numbers, services), **_layer(services)}


def start_tokens(numbers: int, services: Services) -> Tensors:
    """Tensors that read so many numbers from each token's state: a linear map with a bias, which is all 0 at the start. Of the families
    whose layer is known only that of ModernBERT stands before it, too."""
    return {**_linear(numbers, services), **(_layer(services) if "norm" in services.parts.layer else {})}


def _linear(numbers: int, services: Services) -> Tensors:
    return {"weight": torch.zeros(numbers, services.parts.output_width), "bias": torch.zeros(numbers)}


def _layer(services: Services) -> Tensors:
    parts, width = services.parts, services.parts.output_width
    own: Tensors = {}
    for name in parts.layer:
        if name == "norm":
            own["norm_weight"] = torch.ones(width)
            continue
        rng = services.rng("layer of a head")
        own[f"{name}_weight"] = (parts.initial_deviation or SPREAD) * torch.randn(width, width, generator=rng)
        if "norm" not in parts.layer:
            own[f"{name}_bias"] = torch.zeros(width)
        # Only a pooler with the same activation is such a layer already trained.
        pooler = {p.tensor: p for p in parts.places if p.module.endswith("pooler.dense")} if name == "tanh" else {}
        own |= {f"{name}_{tensor}": services.weight(place) for tensor, place in pooler.items()}
    return own


def read(own: Tensors, hidden_BD: Tensor) -> Tensor:
    """The numbers of each state, [B, K]."""
    for name, activation in ACTIVATIONS.items():
        if f"{name}_weight" in own:
            hidden_BD = activation(functional.linear(hidden_BD, own[f"{name}_weight"], own.get(f"{name}_bias")))
    if "norm_weight" in own:
        hidden_BD = functional.layer_norm(hidden_BD, hidden_BD.shape[1:], own["norm_weight"])
    return functional.linear(hidden_BD, own["weight"], own.get("bias"))
