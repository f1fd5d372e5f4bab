"""Fastfood (Le, Sarlos and Smola, 2013): random projections y = H G Pi H B v without a matrix, made again from a seed where needed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 1 << 16
"""Numbers that one transform makes at most: larger ones would pad more, and need more memory while they are computed."""


class Fastfood(NamedTuple):
    """One projection: C chunks of S outputs each, S a power of two. The paper's B, Pi and G."""

    sign_CS: Tensor
    order_CS: Tensor
    """Which number comes to stand here."""
    normal_CS: Tensor

    def like(self, other: Tensor) -> Fastfood:
        """The same on a tensor's device and in its type."""
        return Fastfood(self.sign_CS.to(other), self.order_CS.to(other.device), self.normal_CS.to(other))


def project(vector: Tensor, size: int, seed: int, *, chunk: int = CHUNK) -> Tensor:
    """P v: `size` numbers, of the vector's length on average, by the projection of a seed. Its gradient is the exact adjoint.

    Args:
        vector: v, [d], in fp32 or wider.
        size: how many numbers are made.
        seed: of the projection; the same numbers on every device and in every type.
        chunk: numbers that one transform makes at most, a power of two; more where the vector itself is longer.
    """
    projected: Tensor = _Project.apply(vector, size, seed, chunk)  # type: ignore[no-untyped-call]
    return projected


class _Project(torch.autograd.Function):
    """H is its own transpose: the backward pass is the same transform the other way, and no intermediate result is kept."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, size: int, seed: int, chunk: int) -> Tensor:
        ctx.length, ctx.seed, ctx.chunk = len(vector), seed, chunk
        return fastfood(vector, draw(len(vector), size, seed, chunk).like(vector), size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        drawn = draw(ctx.length, len(gradient), ctx.seed, ctx.chunk)
        return fastfood_adjoint(gradient, drawn.like(gradient), ctx.length), None, None, None


def draw(length: int, size: int, seed: int, chunk: int = CHUNK) -> Fastfood:
    """The projection of a seed from `length` numbers to `size`, in fp32 on the CPU."""
    side = max(min(_power(size), chunk), _power(length))
    chunks = -(-size // side)
    rng = torch.Generator().manual_seed(seed)
    sign_CS = torch.empty(chunks, side).bernoulli_(0.5, generator=rng).mul_(2).sub_(1)
    order_CS = torch.stack([torch.randperm(side, generator=rng) for _ in range(chunks)])
    return Fastfood(sign_CS, order_CS, torch.randn(chunks, side, generator=rng))


def _power(size: int) -> int:
    """The smallest power of two that is not below a size."""
    return 1 << (size - 1).bit_length()


def fastfood(vector: Tensor, drawn: Fastfood, size: int) -> Tensor:
    """H G Pi H B v, normalized so that the mean square length over projections is the vector's: `size` numbers."""
    side = drawn.sign_CS.shape[1]
    mixed_CS = walsh_hadamard(drawn.sign_CS * functional.pad(vector, (0, side - len(vector))))
    made_CS = walsh_hadamard(drawn.normal_CS * mixed_CS.gather(1, drawn.order_CS))
    return (made_CS / _norms(drawn, size)).reshape(-1)[:size]


def fastfood_adjoint(values: Tensor, drawn: Fastfood, length: int) -> Tensor:
    """The transpose of `fastfood`, B H Pi' G H: from `size` numbers to `length`, summed over the chunks."""
    padded_CS = functional.pad(values, (0, drawn.sign_CS.numel() - len(values))).view_as(drawn.sign_CS)
    mixed_CS = drawn.normal_CS * walsh_hadamard(padded_CS / _norms(drawn, len(values)))
    back_CS = torch.zeros_like(mixed_CS).scatter_(1, drawn.order_CS, mixed_CS)
    return (drawn.sign_CS * walsh_hadamard(back_CS)).sum(0)[:length]


def _norms(drawn: Fastfood, size: int) -> Tensor:
    """sqrt(S sum G^2) sqrt(size / S) for each chunk, [C, 1]."""
    return (size * drawn.normal_CS.square().sum(1, keepdim=True)).sqrt()


def walsh_hadamard(x_CS: Tensor) -> Tensor:
    """H x along the last axis, whose length is a power of two: H_1 = [1], H_2S = [[H_S, H_S], [H_S, -H_S]], not normalized."""
    side = x_CS.shape[-1]
    upper = 1 << ((side.bit_length() - 1) // 2)
    # H of a product of sides is the Kronecker product of both: two short products of matrices are faster than log S passes.
    pairs = x_CS.reshape(*x_CS.shape[:-1], upper, side // upper)
    made: Tensor = _hadamard(upper, x_CS) @ pairs @ _hadamard(side // upper, x_CS)
    return made.reshape(x_CS.shape)


def _hadamard(size: int, like: Tensor) -> Tensor:
    """H as a matrix, [size, size]."""
    matrix = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
