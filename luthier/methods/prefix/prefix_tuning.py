"""Prefix tuning (Li and Liang, 2021, section 4): trained keys and values to which every query of every block may attend."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Prefix, Services, Tensors
from luthier.kinds.parts import Parts
from luthier.registry import method

Reparameterization = Literal["network", "none"]


@method(
    title="Prefix tuning",
    paper="arXiv:2101.00190",
    departs="positions of the tokens are not shifted and the keys carry no rotation, so that the prefix stands at no position; the "
    "network is kept with the keys and values it makes",
    step0="on purpose not the base",
    merges="never",
    learning_rate=1e-3,
)
def prefix_tuning(*, length: int = 30, reparameterization: Reparameterization = "network", hidden: int = 512) -> Prefix:
    """Let every query attend to trained keys and values, as if the model had read something.

    Args:
        length: P, keys and values of each key/value head; 30 is where arXiv:2110.04366 finds them to count most, 200 its baseline.
        reparameterization: `network` makes them from embeddings by two maps with a tanh between, which the paper finds steadier;
            `none` trains them directly.
        hidden: width of the network, 512 in the paper; read where there is one.
    """
    if length < 1:
        raise LuthierError(f"the length is {length}", where="prefix_tuning: length", fix="use at least 1")
    if hidden < 1:
        raise LuthierError(f"the hidden width is {hidden}", where="prefix_tuning: hidden", fix="use at least 1")
    return _by_network(length, hidden) if reparameterization == "network" else _direct(length)


def _direct(length: int) -> Prefix:
    def start(parts: Parts, services: Services) -> Tensors:
        _, heads, width = parts.uniform_heads("prefix_tuning")
        shape = (parts.blocks, heads, length, width)
        rng = services.rng("prefix")
        return {name: torch.randn(shape, generator=rng) for name in ("key", "value")}

    def keyvalue(tensors: Tensors, block: int) -> tuple[Tensor, Tensor]:
        return tensors["key"][block], tensors["value"][block]

    return Prefix(start, keyvalue)


def _by_network(length: int, hidden: int) -> Prefix:
    def start(parts: Parts, services: Services) -> Tensors:
        rng = services.rng("prefix")
        _, heads, width = parts.uniform_heads("prefix_tuning")
        made = 2 * heads * width
        return {
            "embedding": torch.randn(length, parts.width, generator=rng),
            "down": _linear(rng, parts.width, hidden, parts.width),
            "down_bias": _linear(rng, parts.width, hidden),
            # One map for each block, for keys and for values, so that a block makes its own alone.
            "up": _linear(rng, hidden, parts.blocks, 2, heads, width, hidden),
            # A vector: weight decay leaves biases alone.
            "up_bias": _linear(rng, hidden, parts.blocks * made),
        }

    def keyvalue(tensors: Tensors, block: int) -> tuple[Tensor, Tensor]:
        inner_PM = torch.tanh(functional.linear(tensors["embedding"], tensors["down"], tensors["down_bias"]))
        up_KHWM = tensors["up"][block]
        bias_KHW = tensors["up_bias"].reshape(*tensors["up"].shape[:-1])[block]
        key_HPW, value_HPW = torch.einsum("pm,khwm->khpw", inner_PM, up_KHWM) + bias_KHW[:, :, None]
        return key_HPW, value_HPW

    return Prefix(start, keyvalue)


def _linear(rng: torch.Generator, width_in: int, *shape: int) -> Tensor:
    """Uniform in +-1/sqrt(width_in), as PyTorch starts linear maps."""
    bound = 1.0 / math.sqrt(width_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=rng)
