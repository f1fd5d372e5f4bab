"""Intrinsic dimension (Aghajanyan, Zettlemoyer and Gupta, 2020): theta_i = theta_0,i + lambda_i P(theta_d)_i, section 3.

P is a Fastfood transform (Le, Sarlos and Smola, 2013): y = H G Pi H B v, with the Walsh-Hadamard matrix H, random signs B, a random
order Pi and normal numbers G, made again from a seed wherever it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Place, Services, Tensors, WeightDelta
from luthier.methods.weight_delta._fastfood import project
from luthier.registry import method


class Layout(NamedTuple):
    """What a place must remember: the shape of its weight, its layer's scale, and the seed of its projection."""

    width_out: int
    width_in: int
    layer: int
    seed: int

    @property
    def size(self) -> int:
        """Numbers of the weight."""
        return self.width_out * self.width_in


@method(
    title="SAID",
    paper="arXiv:2012.13255",
    row=82,
    reduces_to="scales none: DID, the same without scales",
    departs="projects onto linear maps alone, where the paper moves every number; a large matrix is projected onto in chunks, each by a "
    "transform of its own",
    learning_rate=5e-3,
    replication="said",
)
def said(
    *, dimension: int = 200, scales: Literal["block", "none"] = "block", target_modules: tuple[str, ...] = ("linear",)
) -> WeightDelta:
    """Train a few parameters in all, which a fixed random projection spreads over every linear map.

    The smallest dimension that reaches 90% of full fine-tuning's score is the task's intrinsic dimension for this model; see
    `intrinsic_dimension`. Tune the learning rate for each dimension: a bad one makes it look larger. A projection keeps the length
    of the vector in every map on average, so with AdamW n maps move together by about learning rate * sqrt(dimension * n) a step.

    Args:
        dimension: d, how many parameters train in all, scales included; the paper finds 207 for RoBERTa-large on MRPC.
        scales: lambda, a trained scale for each block (SAID), or none (DID). Scales begin at 1 and move from the second step on.
        target_modules: what is projected onto; module types or groups of them.
    """
    if dimension < 1:
        raise LuthierError(f"the dimension is {dimension}", where="said: dimension", fix="use at least 1")

    def shared(places: Sequence[Place], services: Services) -> Tensors:
        # What stands outside the blocks is one more layer.
        layers = services.parts.blocks + any(place.block is None for place in places)
        count = layers if scales == "block" else 0
        if dimension <= count:
            raise LuthierError(
                f"of {dimension} numbers {count} would be scales, and none is left to project",
                where="said: dimension",
                fix=f"use at least {count + 1}, or scales: none",
            )
        vector = {"vector": torch.zeros(dimension - count)}
        return {**vector, "scale": torch.ones(count)} if count else vector

    def start(place: Place, weight_OI: Tensor, services: Services) -> Tensors:
        seed = int(torch.randint(1 << 62, (), generator=services.rng(f"said {place}")))
        layer = services.parts.blocks if place.block is None else place.block
        return {"layout": torch.tensor([*weight_OI.shape, layer, seed])}

    def delta(tensors: Tensors) -> Tensor:
        layout = Layout(*tensors["layout"].tolist())
        projected_OI = project(tensors["vector"], layout.size, layout.seed).view(layout.width_out, layout.width_in)
        return tensors["scale"][layout.layer] * projected_OI if scales == "block" else projected_OI

    def apply(tensors: Tensors, x: Tensor) -> Tensor:
        return functional.linear(x, delta(tensors).to(x.dtype))

    # Sums of a transform are too long for narrow types, and a scale near 1 would be 1 in them.
    wide = frozenset({"vector", "scale"})
    return WeightDelta(start, apply, delta, target_modules=target_modules, frozen=frozenset({"layout"}), shared=shared, wide=wide)


def intrinsic_dimension(scores: Mapping[int, float], full: float, *, share: float = 0.9) -> int | None:
    """d_90: the smallest dimension whose score reaches a share of full fine-tuning's; None where none does.

    Args:
        scores: the best score over learning rates and seeds, by dimension; higher is better.
        full: the score of full fine-tuning, above 0.
        share: of the full score that must be reached; the paper's 0.9.
    """
    # A score that is just the share must not fail by rounding.
    needed = share * full * (1 - 1e-9)
    return min((dimension for dimension, score in scores.items() if score >= needed), default=None)
