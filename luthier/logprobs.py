"""The one place where hidden states become numbers about tokens.

The language-model head runs once a micro-batch, only at positions whose next token is a target, in chunks; each chunk makes the
columns (loss, entropy, KL to a reference ...) that all terms and weights asked for, and the logits of the whole batch never exist
together. Softmax and losses are in fp32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.errors import LuthierError, nearest
from luthier.kinds import Batch, Chunk, Column

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to logits [N, V]."""

LOGIT_BYTES = 256 * 2**20
"""Most memory that the logits of one chunk may take."""

_SLICE = 64
"""Rows of logits turned to fp32 at a time: small enough to stay in the processor's cache."""


class Targets(NamedTuple):
    """The targets of a batch: where the hidden state that predicts each stands, and what it predicts. All have shape [N]."""

    row_N: Tensor
    source_N: Tensor
    """Time index of the hidden state, one before the target's."""
    label_N: Tensor


def targets(batch: Batch) -> Targets:
    """Find the targets of a batch. This is the causal shift, done here and nowhere else.

    A target must directly follow an attended token of its row; a label at a row's first token has nothing before it to predict it.
    """
    follows = (batch.label_BT[:, 1:] >= 0) & batch.attend_BT[:, :-1]
    row_N, source_N = follows.nonzero(as_tuple=True)
    return Targets(row_N, source_N, batch.label_BT[row_N, source_N + 1])


def _scratch(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one slice in fp32, used again and again: fresh memory costs more than what is computed in it."""
    return torch.empty(min(_SLICE, len(logits_CV)), logits_CV.shape[1], dtype=dtype, device=logits_CV.device)


class _Nll(torch.autograd.Function):
    """Negative log-likelihood in fp32 from logits of any type, keeping nothing for backward but the logits themselves."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, label_C: Tensor) -> Tensor:
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        total_C = torch.empty(len(logits_CV), dtype=wide, device=logits_CV.device)
        scratch = _scratch(logits_CV, wide)
        for i in range(0, len(logits_CV), _SLICE):
            soft = scratch[: len(logits_CV) - i].copy_(logits_CV[i : i + _SLICE])
            top = soft.amax(-1, keepdim=True)
            top = top.masked_fill(top.isinf(), 0.0)
            total_C[i : i + _SLICE] = soft.sub_(top).exp_().sum(-1).log_().add_(top[:, 0])
        ctx.save_for_backward(logits_CV, label_C, total_C)
        return total_C - logits_CV.gather(-1, label_C[:, None])[:, 0].to(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_C,) = gradients
        logits_CV, label_C, total_C = ctx.saved_tensors
        result_CV = torch.empty_like(logits_CV)
        scratch = _scratch(logits_CV, total_C.dtype)
        for i in range(0, len(logits_CV), _SLICE):
            part = slice(i, i + _SLICE)
            soft = scratch[: len(logits_CV) - i].copy_(logits_CV[part]).sub_(total_C[part, None]).exp_()
            soft.scatter_add_(-1, label_C[part, None], soft.new_full((len(soft), 1), -1.0))
            result_CV[part] = soft.mul_(gradient_C[part, None])
        return result_CV, None


def nll(logits_CV: Tensor, label_C: Tensor) -> Tensor:
    """Negative log-likelihood of each label, [C], in fp32 (fp64 for fp64 logits)."""
    return _Nll.apply(logits_CV, label_C)  # type: ignore[no-any-return,no-untyped-call]


def _entropy(chunk: Chunk) -> Tensor:
    log_CV = chunk.logits_CV.log_softmax(-1)
    return -(log_CV.exp() * log_CV).sum(-1)


def _kl(chunk: Chunk) -> Tensor:
    log_CV, reference_CV = chunk.logits_CV.log_softmax(-1), _reference(chunk).log_softmax(-1)
    return (log_CV.exp() * (log_CV - reference_CV)).sum(-1)


def _kl_forward(chunk: Chunk) -> Tensor:
    log_CV, reference_CV = chunk.logits_CV.log_softmax(-1), _reference(chunk).log_softmax(-1)
    return (reference_CV.exp() * (reference_CV - log_CV)).sum(-1)


def _reference(chunk: Chunk) -> Tensor:
    if chunk.reference_logits_CV is None:
        raise RuntimeError("a column reads the base's logits without asking for them: Column(..., reference=True)")
    return chunk.reference_logits_CV


COLUMNS: Mapping[str, Column] = {
    column.name: column
    for column in (
        Column("nll", lambda chunk: nll(chunk.logits_CV, chunk.label_C)),
        Column("entropy", _entropy),
        Column("right", lambda chunk: (chunk.logits_CV.argmax(-1) == chunk.label_C).float(), gradient=False),
        Column("kl", _kl, reference=True),
        Column("kl_forward", _kl_forward, reference=True),
        Column("reference_nll", lambda chunk: nll(_reference(chunk), chunk.label_C), reference=True, gradient=False),
    )
}
"""Columns known by name: `nll`; `entropy` of the distribution; `right`, 1 where the target is the most likely token; `kl`, from the
model to the base; `kl_forward`, from the base to the model; `reference_nll`, the base's. All in nats, shape [N]."""


def resolve(wanted: Sequence[str | Column]) -> tuple[Column, ...]:
    """Columns by name or value, each once."""
    found: dict[str, Column] = {}
    for item in wanted:
        if isinstance(item, str) and item not in COLUMNS:
            raise LuthierError(f"there is no column `{item}`", mend=nearest(item, COLUMNS))
        column = COLUMNS[item] if isinstance(item, str) else item
        if found.setdefault(column.name, column) is not column:
            raise LuthierError(f"two parts define the column `{column.name}` differently", mend="rename the column in one of them")
    return tuple(found.values())


def compute(
    hidden_ND: Tensor,
    label_N: Tensor,
    head: Head,
    wanted: Sequence[Column],
    *,
    key_N: Tensor | None = None,
    reference: tuple[Tensor, Head] | None = None,
    vocabulary: int,
    limit_bytes: int = LOGIT_BYTES,
) -> dict[str, Tensor]:
    """Columns of labelled positions, by name, each [N].

    Args:
        hidden_ND: last hidden states (normed, as the head takes them) of the positions that predict.
        label_N: the targets.
        head: hidden states to logits.
        wanted: the columns.
        key_N: keys for random draws.
        reference: the base's hidden states at the same positions, and the base's head.
        vocabulary: V, to size the chunks.
        limit_bytes: most bytes of one chunk's logits; more than one chunk are recomputed in backward instead of being kept.
    """
    count = len(label_N)
    key_N = torch.zeros_like(label_N) if key_N is None else key_N
    whole = any(column.name != "nll" for column in wanted)
    bytes_each = hidden_ND.element_size() + (8 if whole else 0)
    size = max(1, limit_bytes // (vocabulary * bytes_each))
    reference_hidden_ND, reference_head = reference if reference is not None else (hidden_ND, head)

    def make(hidden_CD: Tensor, label_C: Tensor, key_C: Tensor, reference_CD: Tensor) -> tuple[Tensor, ...]:
        logits_CV = head(hidden_CD)
        other_CV = None
        if any(column.reference for column in wanted):
            with torch.no_grad():
                other_CV = _widen(reference_head(reference_CD))
        values = []
        for column in wanted:
            if column.name == "nll":
                values.append(nll(logits_CV, label_C))
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and column.gradient):
                wide_CV = _widen(logits_CV if column.gradient else logits_CV.detach())
                values.append(column.value(Chunk(wide_CV, label_C, key_C, other_CV)))
        return tuple(values)

    pieces: list[tuple[Tensor, ...]] = []
    for i in range(0, max(count, 1), size):
        part = slice(i, i + size)
        inputs = (hidden_ND[part], label_N[part], key_N[part], reference_hidden_ND[part])
        if count > size and torch.is_grad_enabled():
            pieces.append(checkpoint(make, *inputs, use_reentrant=False))
        else:
            pieces.append(make(*inputs))
    return {column.name: torch.cat([piece[k] for piece in pieces]) for k, column in enumerate(wanted)}


def _widen(logits_CV: Tensor) -> Tensor:
    return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
