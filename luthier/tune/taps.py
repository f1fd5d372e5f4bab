"""Gradients of a slice of a frozen weight, without ever forming more than that slice needs.

A tap sits behind a module and returns its output untouched, so it does not care how the output was computed (a delta on top, a
quantized weight, a sharded one). In backward it forms the wanted numbers from the output's gradient and the module's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.kinds import Form


class TapSpec(NamedTuple):
    """What a tap forms. `part` limits it to these output rows of a fused projection."""

    form: Form
    index: Tensor | None  # type: ignore[assignment]
    part: slice | None = None
    of: str = "linear"
    """linear | bias | embedding: how the module turns input and weight into output."""
    rows: int = 0
    """Rows of the table, for an embedding."""
    scale: float = 1.0
    """What an embedding multiplies its rows with (Gemma)."""
    padding: int | None = None
    """The row of an embedding that gets no gradient from it, as in PyTorch."""
    collect: Callable[[Tensor], None] | None = None
    """Gets the whole dense gradient instead of a leaf getting a slice."""
    wanted: Callable[[], bool] | None = None
    """Whether the tap stands in this forward pass; None: always."""


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, leaf: Tensor, spec: TapSpec) -> Tensor:
        ctx.spec, ctx.leaf_type = spec, leaf.dtype
        ctx.leaf_shape = leaf.shape
        if spec.of == "bias":
            ctx.save_for_backward()
        elif spec.of == "linear" and spec.form == "cols" and spec.collect is None:
            ctx.save_for_backward(x[..., spec.index])
        else:
            ctx.save_for_backward(x)
        # No view: what a model adds to it in place (Llama 4) autograd refuses for those.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (gradient,) = gradients
        spec: TapSpec = ctx.spec
        gy = gradient if spec.part is None else gradient[..., spec.part]
        gy = gy.reshape(-1, gy.shape[-1])
        formed = _form(gy, ctx.saved_tensors, spec)
        if spec.collect is not None:
            spec.collect(formed)
            return gradient, None, torch.zeros(ctx.leaf_shape, dtype=ctx.leaf_type, device=gradient.device), None
        return gradient, None, formed.to(ctx.leaf_type), None


def _form(gy: Tensor, saved: tuple[Tensor, ...], spec: TapSpec) -> Tensor:
    dense = spec.collect is not None
    if spec.of == "bias":
        total = gy.sum(0)
        return total if dense or spec.index is None else total[spec.index]
    if spec.of == "embedding":
        ids = saved[0].reshape(-1)
        # Virtual ids are negative; their embeddings are not rows of the table.
        ids = ids if spec.padding is None else ids.masked_fill(ids == spec.padding, -1)
        gy = gy if spec.scale == 1.0 else gy * spec.scale
        if spec.form == "rows" and not dense and spec.index is not None:
            slot = torch.full((spec.rows,), -1, dtype=torch.int64, device=ids.device)
            slot[spec.index] = torch.arange(len(spec.index), device=ids.device)
            kept = (ids >= 0) & (slot[ids.clamp(min=0)] >= 0)
            # fp32 sums: many positions can add to one row.
            rows = torch.zeros(len(spec.index), gy.shape[1], dtype=torch.promote_types(gy.dtype, torch.float32), device=gy.device)
            return rows.index_add_(0, slot[ids[kept]], gy[kept].to(rows.dtype))
        table = torch.zeros(spec.rows, gy.shape[1], dtype=torch.promote_types(gy.dtype, torch.float32), device=gy.device)
        table.index_add_(0, ids.clamp(min=0), gy.to(table.dtype) * (ids >= 0)[:, None])
        return table if dense else _slice(table, spec)
    x = saved[0].reshape(-1, saved[0].shape[-1]).to(gy.dtype)
    if dense:
        return gy.t() @ x
    if spec.form == "rows" and spec.index is not None:
        return gy[:, spec.index].t() @ x
    if spec.form == "cols":
        return gy.t() @ x
    return _slice(gy.t() @ x, spec)


def _slice(gradient_OI: Tensor, spec: TapSpec) -> Tensor:
    if spec.index is None:
        return gradient_OI
    if spec.form == "rows":
        return gradient_OI[spec.index]
    if spec.form == "cols":
        return gradient_OI[:, spec.index]
    return gradient_OI.reshape(-1)[spec.index]


def tap(y: Tensor, x: Tensor, leaf: Tensor, spec: TapSpec) -> Tensor:
    """Return `y` untouched; in backward give `leaf` the gradient of the numbers that `spec` names.

    Args:
        y: the module's output.
        x: its input (token ids for an embedding).
        leaf: the trained slice, or any leaf when the dense gradient is collected.
        spec: what to form.
    """
    return _Tap.apply(y, x, leaf, spec)  # type: ignore[no-any-return,no-untyped-call]
