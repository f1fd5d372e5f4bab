"""The one place where hidden states become numbers about tokens.

The language-model head runs once a micro-batch, only at positions whose next token is a label, in chunks; each chunk makes the
columns (loss, entropy, KL to a reference ...) that all terms and weights asked for, and the logits of the whole batch never exist
together. Softmax and losses are in fp32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.columns.losses import kl, nll, nll_and_entropy, rows_of_slice
from luthier.errors import LuthierError, nearest
from luthier.kinds import BASE, Chunk, Column, OtherPass

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to logits [N, V]."""


LOGIT_BYTES = 256 * 2**20
"""Most memory that the logits of one chunk may take."""


def _entropy(chunk: Chunk) -> Tensor:
    log_CV = chunk.log_probabilities
    return -(log_CV.exp() * log_CV).sum(-1)


def _not_from_logits(chunk: Chunk) -> Tensor:
    raise RuntimeError("this column is made where the model runs")


CONTEXT_ATTENTION = Column("context_attention", _not_from_logits, gradient=False)
"""For each label as a query, the share of the last block's attention, a mean over its heads, that goes to the tokens before it in its row
that are no labels. Made by the pass of the model, see `luthier.models.attention`."""


COLUMNS: Mapping[str, Column] = {
    column.name: column
    for column in (
        Column("nll", lambda chunk: nll(chunk.logits_CV, chunk.label_C)),
        Column("entropy", lambda chunk: nll_and_entropy(chunk.logits_CV, chunk.label_C)[1], gradient=False),
        Column("differentiable_entropy", _entropy),
        Column("right", lambda chunk: (chunk.logits_CV.argmax(-1) == chunk.label_C).float(), gradient=False),
        Column("kl", lambda chunk: kl(chunk.log_probabilities, chunk.other_log_probabilities()), (BASE,)),
        Column("kl_forward", lambda chunk: kl(chunk.other_log_probabilities(), chunk.log_probabilities), (BASE,)),
        Column("reference_nll", lambda chunk: nll(chunk.others["base"], chunk.label_C), (BASE,), gradient=False),
        CONTEXT_ATTENTION,
    )
}
"""Columns known by name: `nll`; `entropy` of the distribution, without a gradient and at almost no cost beside `nll`;
`differentiable_entropy`; `right`, 1 where the label is the most likely token; `kl`, from the model to the base; `kl_forward`, from the
base to the model; `reference_nll`, the base's; all in nats. `context_attention`, from 0 to 1, is the attention of the label's own place
to what is no label. Shape [N]."""


def resolve(wanted: Sequence[str | Column]) -> tuple[Column, ...]:
    """Columns by name or value, each once."""
    found: dict[str, Column] = {}
    for item in wanted:
        if isinstance(item, str) and item not in COLUMNS:
            raise LuthierError(f"there is no column `{item}`", fix=nearest(item, COLUMNS))
        column = COLUMNS[item] if isinstance(item, str) else item
        if found.setdefault(column.name, column) is not column:
            raise LuthierError(f"two parts define the column `{column.name}` differently", fix="rename the column in one of them")
    return tuple(found.values())


def passes_of(columns: Sequence[Column]) -> tuple[OtherPass, ...]:
    """The other passes that columns read, each once.

    Raises:
        LuthierError: two columns mean different passes by one name.
    """
    return alike([one for column in columns for one in column.passes])


def alike(passes: Sequence[OtherPass]) -> tuple[OtherPass, ...]:
    """Passes, each once.

    Raises:
        LuthierError: two different ones have one name.
    """
    found: dict[str, OtherPass] = {}
    for one in passes:
        if found.setdefault(one.name, one) != one:
            raise LuthierError(f"two parts define the pass `{one.name}` differently", fix="rename the pass in one of them")
    return tuple(found.values())


class Other(NamedTuple):
    """Another pass, as far as the head."""

    hidden_ND: Tensor
    head: Head
    gradient: bool = False


def compute(
    hidden_ND: Tensor,
    label_N: Tensor,
    head: Head,
    wanted: Sequence[Column],
    *,
    key_N: Tensor | None = None,
    drawing: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext,
    others: Mapping[str, Other] | None = None,
    given: Mapping[str, Tensor] | None = None,
    vocabulary: int,
    limit_bytes: int = LOGIT_BYTES,
) -> dict[str, Tensor]:
    """Columns of labelled positions, by name, each [N], or [N, ...] where a column is so.

    Args:
        hidden_ND: last hidden states (normed, as the head takes them) of the positions that predict.
        label_N: the labels.
        head: hidden states to logits.
        wanted: the columns.
        key_N: keys for random draws.
        drawing: in this context, which gets the keys of the positions, the head runs.
        others: other passes' hidden states at the same positions, and their heads, by name.
        given: what the rows carry for the labels, [N, ...], by name.
        vocabulary: V, to size the chunks.
        limit_bytes: most bytes of one chunk's logits; more than one chunk are recomputed in backward instead of being kept.
    """
    if not wanted:
        return {}
    count, others, given = len(label_N), others or {}, given or {}
    key_N = torch.zeros_like(label_N) if key_N is None else key_N
    size = max(1, limit_bytes // (vocabulary * hidden_ND.element_size() * (1 + len(others))))
    plain = {column.name for column in wanted} & {"nll", "entropy"}
    lazy = [column for column in wanted if column.name not in plain]

    def make(hidden_CD: Tensor, label_C: Tensor, key_C: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        given_C, other_CD = more[: len(given)], more[len(given) :]
        with drawing(key_C):
            logits_CV = head(hidden_CD)
        found: dict[str, Tensor] = {}
        if plain:
            found["nll"], found["entropy"] = nll_and_entropy(logits_CV, label_C, with_entropy="entropy" in plain)
        if lazy:
            others_CV = []
            for one, states_CD in zip(others.values(), other_CD, strict=True):
                with torch.set_grad_enabled(torch.is_grad_enabled() and one.gradient):
                    others_CV.append(one.head(states_CD))
            names = (tuple(given), tuple(others))
            made = _Slices.apply(lazy, names, label_C, key_C, *given_C, logits_CV, *others_CV)  # type: ignore[no-untyped-call]
            found.update(zip((column.name for column in lazy), made, strict=True))
        return tuple(found[column.name] for column in wanted)

    pieces: list[tuple[Tensor, ...]] = []
    for i in range(0, max(count, 1), size):
        part = slice(i, i + size)
        more = (*(one[part] for one in given.values()), *(one.hidden_ND[part] for one in others.values()))
        inputs = (hidden_ND[part], label_N[part], key_N[part], *more)
        if count > size and torch.is_grad_enabled():
            pieces.append(checkpoint(make, *inputs, use_reentrant=False))
        else:
            pieces.append(make(*inputs))
    return {column.name: torch.cat([piece[k] for piece in pieces]) for k, column in enumerate(wanted)}


class _Slices(torch.autograd.Function):
    """Columns of whole distributions, some rows at a time: in fp32 whatever the logits are, keeping nothing for backward but these.

    A slice's graph is made and used up while its numbers are still in the processor's cache; that of a whole chunk would take several
    times the memory of its logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        columns: Sequence[Column],
        names: tuple[tuple[str, ...], tuple[str, ...]],
        label_C: Tensor,
        key_C: Tensor,
        *more: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.columns, ctx.names = columns, names
        ctx.save_for_backward(label_C, key_C, *more)
        given, all_CV = more[: len(names[0])], more[len(names[0]) :]
        ctx.set_materialize_grads(False)
        ctx.kept = []
        pieces = []
        size = rows_of_slice(all_CV[0])
        for i in range(0, max(len(label_C), 1), size):
            part = slice(i, i + size)
            wide = [_widen(one_CV[part]) for one_CV in all_CV]
            others, known = dict(zip(names[1], wide[1:], strict=True)), _part(names[0], given, part)
            chunk = Chunk(wide[0], label_C[part], key_C[part], others, given=known)
            pieces.append([column.value(chunk) for column in columns])
            ctx.kept.append(chunk.kept)
        made = tuple(torch.cat(one) for one in zip(*pieces, strict=True))
        ctx.mark_non_differentiable(*(value for column, value in zip(columns, made, strict=True) if not column.gradient))
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_given, of_others = ctx.names
        label_C, key_C, *more = ctx.saved_tensors
        given, all_CV = more[: len(of_given)], more[len(of_given) :]
        wanted = ctx.needs_input_grad[4 + len(given) :]
        flowing = {k: one for k, one in enumerate(gradients) if one is not None and ctx.columns[k].gradient}
        found = [torch.zeros_like(one) if needed else None for one, needed in zip(all_CV, wanted, strict=True)]
        size = rows_of_slice(all_CV[0])
        for i in range(0, len(label_C) if flowing else 0, size):
            part = slice(i, i + size)
            with torch.enable_grad():
                wide = [_widen(one[part].detach()).requires_grad_(needed) for one, needed in zip(all_CV, wanted, strict=True)]
                others, known = dict(zip(of_others, wide[1:], strict=True)), _part(of_given, given, part)
                chunk = Chunk(wide[0], label_C[part], key_C[part], others, ctx.kept[i // size], known)
                values = [(k, ctx.columns[k].value(chunk)) for k in flowing]
            values = [(k, value) for k, value in values if value.requires_grad]
            leaves = [one for one in wide if one.requires_grad]
            each = [flowing[k][part].to(value) for k, value in values]
            slopes = iter(torch.autograd.grad([value for _, value in values], leaves, each, allow_unused=True) if values else ())
            for mine in (one for one in found if one is not None):
                slope = next(slopes, None)
                if slope is not None:
                    mine[part] = slope
        return (None, None, None, None, *(None for _ in given), *found)


def _part(names: Sequence[str], given: Sequence[Tensor], part: slice) -> dict[str, Tensor]:
    return {name: one[part] for name, one in zip(names, given, strict=True)}


def _widen(logits_CV: Tensor) -> Tensor:
    return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
