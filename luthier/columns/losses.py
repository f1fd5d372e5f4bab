"""Losses from logits: softmax and sums in fp32 whatever the logits are, a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SLICE_BYTES = {"cpu": 6 * 2**20}
"""Most bytes of logits turned to fp32 at a time: on a processor few enough to stay in its cache."""


_LARGE_SLICE_BYTES = 64 * 2**20
"""The same on an accelerator, where many small slices would cost more than they save."""


def rows_of_slice(logits_CV: Tensor) -> int:
    """How many rows of a chunk are turned to fp32 at a time."""
    most = _SLICE_BYTES.get(logits_CV.device.type, _LARGE_SLICE_BYTES)
    return max(1, most // (4 * max(1, logits_CV.shape[1])))


def _scratch(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one slice in fp32, used again and again: fresh memory costs more than what is computed in it."""
    rows = min(rows_of_slice(logits_CV), len(logits_CV))
    return torch.empty(rows, logits_CV.shape[1], dtype=dtype, device=logits_CV.device)


class _Nll(torch.autograd.Function):
    """Negative log-likelihood in fp32 from logits of any type, keeping nothing for backward but the logits themselves; on the way and
    where asked for the entropy, without a gradient."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, label_C: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        total_C = torch.empty(len(logits_CV), dtype=wide, device=logits_CV.device)
        entropy_C = torch.empty_like(total_C) if with_entropy else total_C.new_empty(0)
        scratch = _scratch(logits_CV, wide)
        other = _scratch(logits_CV, wide) if with_entropy else scratch
        size = rows_of_slice(logits_CV)
        for i in range(0, len(logits_CV), size):
            part = slice(i, i + size)
            soft = scratch[: len(logits_CV) - i].copy_(logits_CV[part])
            top = soft.amax(1, keepdim=True)
            top = top.masked_fill(top.isinf(), 0.0)
            below = soft.sub_(top)
            if with_entropy:
                below, soft = soft, torch.exp(soft, out=other[: len(logits_CV) - i])
            else:
                soft.exp_()
            sums = soft.sum(1)
            total_C[part] = sums.log()
            if with_entropy:
                # A logit of minus infinity adds nothing, and not 0 * -inf.
                entropy_C[part] = total_C[part] - soft.mul_(below.clamp_(min=torch.finfo(wide).min)).sum(1) / sums
            total_C[part] += top[:, 0]
        ctx.save_for_backward(logits_CV, label_C, total_C)
        ctx.mark_non_differentiable(entropy_C)
        return total_C - logits_CV.gather(1, label_C[:, None])[:, 0].to(wide), entropy_C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient_C = gradients[0]
        logits_CV, label_C, total_C = ctx.saved_tensors
        result_CV = torch.empty_like(logits_CV)
        scratch = _scratch(logits_CV, total_C.dtype)
        size = rows_of_slice(logits_CV)
        for i in range(0, len(logits_CV), size):
            part = slice(i, i + size)
            soft = scratch[: len(logits_CV) - i].copy_(logits_CV[part]).sub_(total_C[part, None]).exp_()
            soft.scatter_add_(-1, label_C[part, None], soft.new_full((len(soft), 1), -1.0))
            result_CV[part] = soft.mul_(gradient_C[part, None])
        return result_CV, None, None


def nll(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    """Negative log-likelihood of each label, [C], in fp32 (fp64 for fp64 logits)."""
    return nll_and_entropy(logits_CV, label_C, with_entropy=False)[0]


def nll_and_entropy(logits_CV: Tensor, label_C: Tensor, *, with_entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [C] and, from the same passes over the vocabulary and without a gradient, the entropy [C]."""
    return _Nll.apply(logits_CV, label_C, with_entropy)  # type: ignore[no-any-return,no-untyped-call]


def kl(log_of_CV: Tensor, log_from_CV: Tensor) -> Tensor:
    """KL(of || from) from log-probabilities, in nats: [C]."""
    return (log_of_CV.exp() * (log_of_CV - log_from_CV)).sum(1)
