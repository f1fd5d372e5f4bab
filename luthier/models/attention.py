"""The owner of attention: trained keys and values join here, packed rows are kept apart but for a beginning that they share, short rows
get a form that is quick to differentiate, and a block tells how much of its attention goes to the context.

A prefix through `past_key_values` is lost under gradient checkpointing, so luthier has an attention function of its own, on top of
scaled dot-product attention. What it needs travels as an argument of the forward pass: state on modules would be read by the
recomputation of another micro-batch, and would make compiled models recompile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.errors import LuthierError
from luthier.kinds.parts import Parts
from luthier.models.faithful import alike as alike_logits
from luthier.models.faithful import own_logits

NAME = "luthier"

SHORT = 256
"""Longest keys for which the plain form is used on processors: in bf16 the fused form's backward takes 5 times as long at 64 tokens,
1.4 times at 256 and as long at 512 (Xeon with AMX, torch 2.13)."""

MASS_BYTES = 64 * 2**20
"""Most memory that the weights of some queries may take while their mass is summed."""

SINKS = "s_aux"
"""What transformers calls the trained score of each head that takes part in the softmax and adds nothing (gpt-oss)."""

_PLAIN_TAKES = frozenset({"scaling", "dropout", "is_causal", "sliding_window", "position_ids", "output_attentions", "use_cache"})


@dataclass(eq=False)
class Mass:
    """Asks one block for the share of its attention that goes to the context, a mean over its heads.

    What wraps a model may copy tuples and lists that it hands on, but not this: the answer stays where it was asked for.
    """

    block: int
    is_context_BT: Tensor
    """True at tokens that are context, [1, N] where rows are packed; trained prefixes always are."""
    found_BT: Tensor | None = None
    """The answer for each token as a query, in fp32 or wider, before dropout."""


class Shared(NamedTuple):
    """The beginning of a packed row, which is that of an earlier row and stands there alone."""

    row: int = 0
    """Number of the earlier row, which is run whole."""
    tokens: int = 0
    """How many of its first tokens; 0: the row shares nothing."""


class Context(NamedTuple):
    """What attention must know in one forward pass."""

    prefixes: tuple[tuple[dict[str, Tensor], Callable[[dict[str, Tensor], int], tuple[Tensor, Tensor]]], ...] = ()
    """Trained tensors and the function that makes a block's keys and values of them, [H, P, width of a head] each."""
    lengths: tuple[int, ...] = ()
    """Tokens of each of the rows that stand one behind the other; empty where every row of the batch is one row."""
    shared: tuple[Shared, ...] = ()
    """What stands before each of these rows and was run with another; empty where every row is run whole."""
    mass: Mass | None = None
    """Asks where one block looks."""
    blocks: Callable[[int, Tensor], Tensor] | None = None
    """What becomes of a block's output, by the block's number; see `luthier.models.block_outputs`."""


class Handle:
    """Gives the model its own attention back."""

    def __init__(self, model: Any, hook: Any, before: str) -> None:
        self.model, self.hook, self.before = model, hook, before

    def remove(self) -> None:
        """Undo `use_context`."""
        self.hook.remove()
        self.model.set_attn_implementation(self.before)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    luthier: Context | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention in which every query may also attend to the prefixes.

    Args:
        module: the attention module; its `layer_idx` is the block.
        query: [B, H, T, W], W the width of a head.
        key: [B, H of keys and values, K, W], as is `value`.
        value: like `key`.
        attention_mask: [B, 1, T, K], True or 0 where a query may look; None: causal.
        luthier: this forward pass's context.
        options: what transformers hands to attention functions.

    Returns:
        The output [B, T, H, W], and None for the weights, which are not kept.
    """
    # Asked once: a checkpointed block runs again in backward.
    if luthier is not None and luthier.mass is not None and luthier.mass.found_BT is None:
        _measure(module, query, key, attention_mask, luthier, luthier.mass, options)
    if luthier is not None and luthier.lengths:
        return _row_by_row(module, query, key, value, luthier, **options), None
    if luthier is not None and luthier.prefixes:
        key, value, attention_mask = _with_prefixes(module, luthier, query, key, value, attention_mask)
    # Scaled dot-product attention knows no sinks, and would leave them out without a word.
    if options.get(SINKS) is not None or _is_short(query, key, options):
        return _plain(module, query, key, value, attention_mask, **options), None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _row_by_row(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, context: Context, **options: Any) -> Tensor:
    """Attention of packed rows, [1, N, H, W]: what one row cannot be given, it cannot see."""
    if _has_varlen(query, context, options):
        return _varlen(query, key, value, context, **options)
    window = options.get("sliding_window")
    alone = context._replace(lengths=(), shared=())
    pieces = []
    rows = (_seen(query, context), _seen(key, context), _seen(value, context), context.shared or repeat(Shared()))
    for queries, keys, values, (_, before) in zip(*rows, strict=False):
        length = keys.shape[2]
        # A row without a mask is computed by half, but with the queries of its beginning; one with a mask whole, but without these.
        short = 2 * before > length
        queries = queries[:, :, before:] if short else queries
        masked = short or (window and length > window)
        mask = _causal(queries.shape[2], length, query.device, window) if masked else None
        output, _ = attention(module, queries, keys, values, mask, alone, **options)
        pieces.append(output if short else output[:, before:])
    return torch.cat(pieces, dim=1)


def _seen(states: Tensor, context: Context) -> Sequence[Tensor]:
    """Queries, keys or values of whole rows: those of the beginning that a row shares, then its own."""
    # No slices of all rows: the gradient of each would be as long as these.
    pieces: tuple[Tensor, ...] = states.split(context.lengths, dim=2)
    if not context.shared:
        return pieces
    return [
        torch.cat([pieces[shared.row][:, :, : shared.tokens], own], dim=2) if shared.tokens else own
        for own, shared in zip(pieces, context.shared, strict=True)
    ]


def _has_varlen(query: Tensor, context: Context, options: dict[str, Any]) -> bool:
    narrow = query.dtype in (torch.float16, torch.bfloat16)
    plain = not context.prefixes and options.get(SINKS) is None
    return query.is_cuda and narrow and plain and not options.get("dropout")


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Context,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **ignored: Any,
) -> Tensor:
    """All rows in one kernel that takes rows of any length; the last query of a row stands beside its last key."""
    seen = context.lengths
    if context.shared:
        seen = tuple(own + shared.tokens for own, shared in zip(context.lengths, context.shared, strict=True))
        key, value = (torch.cat(list(_seen(part, context)), dim=2) for part in (key, value))
    query_starts, key_starts = (
        torch.tensor([0, *accumulate(numbers)], dtype=torch.int32, device=query.device) for numbers in (context.lengths, seen)
    )
    query_NHW, key_MHW, value_MHW = (part[0].transpose(0, 1) for part in (query, key, value))
    output_NHW = varlen_attn(
        query_NHW,
        key_MHW,
        value_MHW,
        query_starts,
        key_starts,
        max(context.lengths),
        max(seen),
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, output_NHW)[None]


def _with_prefixes(
    module: nn.Module, context: Context, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if mask is None:
        mask = _causal(query.shape[2], key.shape[2], query.device)
        # An encoder's row without padding: every token sees all.
        mask = mask if getattr(module, "is_causal", True) else torch.ones_like(mask)
    for tensors, keyvalue in context.prefixes:
        key_HPD, value_HPD = keyvalue(tensors, int(module.layer_idx))  # type: ignore[arg-type]
        key = torch.cat([key_HPD.to(key.dtype).expand(len(key), -1, -1, -1), key], dim=2)
        value = torch.cat([value_HPD.to(value.dtype).expand(len(value), -1, -1, -1), value], dim=2)
        open_mask = torch.ones if mask.dtype == torch.bool else torch.zeros
        room = open_mask(*mask.shape[:-1], key_HPD.shape[1], dtype=mask.dtype, device=mask.device)
        mask = torch.cat([room, mask], dim=-1)
    return key, value, mask


def _measure(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, context: Context, asked: Mass, options: dict[str, Any]
) -> None:
    """Answer if this is the block that is asked."""
    if int(module.layer_idx) != asked.block:  # type: ignore[arg-type]
        return
    if odd := [name for name, value in options.items() if name not in _PLAIN_TAKES and value is not None]:
        raise LuthierError(
            f"attention with {', '.join(odd)} does not tell where it looks",
            where=type(module).__name__,
            fix="leave out what asks for `context_attention`",
        )
    with torch.no_grad():
        before = [keyvalue(tensors, asked.block)[0].to(key.dtype) for tensors, keyvalue in context.prefixes]
        prefix_HPW = torch.cat(before, dim=1) if before else key[0, :, :0]
        pieces, start = [], 0
        for length in context.lengths or (query.shape[2],):
            row = slice(start, start + length)
            here = asked.is_context_BT[:, row]
            pieces.append(_mass(query[:, :, row], key[:, :, row], mask if not context.lengths else None, prefix_HPW, here, options))
            start += length
        asked.found_BT = torch.cat(pieces, dim=1)


def _mass(
    query: Tensor, key: Tensor, mask: Tensor | None, prefix_HPW: Tensor, is_context_BK: Tensor, options: dict[str, Any]
) -> Tensor:
    """The attention [B, T] of each query on context and prefix, some queries at a time."""
    rows, heads, time, width = query.shape
    prefix = prefix_HPW.shape[1]
    key = torch.cat([prefix_HPW.expand(rows, -1, -1, -1), key], dim=2)
    wide = torch.promote_types(query.dtype, torch.float32)
    counts_BK = functional.pad(is_context_BK.to(wide), (prefix, 0), value=1.0)
    scale = width**-0.5 if options.get("scaling") is None else options["scaling"]
    size = max(1, MASS_BYTES // (rows * heads * key.shape[2] * wide.itemsize))
    pieces = []
    for i in range(0, time, size):
        last = min(i + size, time)
        window = options.get("sliding_window")
        seen = _causal(last - i, last, query.device, window) if mask is None else mask[..., i:last, :]
        seen = functional.pad(seen, (prefix, 0), value=1.0 if seen.dtype == torch.bool else 0.0)
        keys = seen.shape[-1]
        # The heads that share a key stand one behind the other: no copy of the key for each.
        shared = (query[:, :, i:last] * scale).reshape(rows, key.shape[1], -1, width)
        score = (shared @ key[:, :, :keys].transpose(-1, -2)).view(rows, heads, last - i, keys)
        weight = _masked(score, seen).softmax(-1, dtype=wide)
        pieces.append((weight @ counts_BK[:, None, :keys, None]).squeeze(-1).mean(1))
    return torch.cat(pieces, dim=1)


def _masked(score: Tensor, mask: Tensor) -> Tensor:
    return score.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else score + mask


_ALIKE: ContextVar[bool] = ContextVar("alike", default=False)


@contextmanager
def alike(compared: bool) -> Iterator[None]:
    """Inside the block passes without gradients take the same form as those with them if they are `compared` with these: two forms round
    differently, and what is equal would differ."""
    token = _ALIKE.set(compared)
    try:
        yield
    finally:
        _ALIKE.reset(token)


def _is_short(query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and (torch.is_grad_enabled() or _ALIKE.get())
        and key.shape[2] <= SHORT
        and not options.get("dropout")
        and all(name in _PLAIN_TAKES or value is None for name, value in options.items())
    )


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """Scores, softmax in fp32, weighted sum: [B, T, H, W]. Sinks [H] are one more score for every query, and no value."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    score = (query * scale) @ key.transpose(-1, -2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and query.shape[2] > 1:
        mask = _causal(query.shape[2], key.shape[2], query.device)
    if mask is not None:
        score = _masked(score, mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    if s_aux is not None:
        score = torch.cat([score, s_aux.to(score.dtype).view(1, -1, 1, 1).expand(*score.shape[:-1], 1)], dim=-1)
    weight = score.softmax(-1, dtype=wide)[..., : key.shape[2]].to(query.dtype)
    if dropout:
        weight = functional.dropout(weight, dropout)
    return (weight @ value).transpose(1, 2).contiguous()


def _causal(queries: int, keys: int, device: torch.device, window: int | None = None) -> Tensor:
    here = torch.arange(keys - queries, keys, device=device)[:, None]
    there = torch.arange(keys, device=device)[None, :]
    seen = there <= here
    return (seen & (there > here - window) if window else seen)[None, None]


def use_context(model: nn.Module, parts: Parts, context: Callable[[], Context]) -> Handle:
    """Let a model's attention ask for a context at every forward pass.

    Raises:
        LuthierError: the model does not use the exchangeable attention of transformers, so a prefix would be ignored, or its own
            attention does what luthier's would leave out.
    """
    transformer: Any = model
    before = transformer.config._attn_implementation
    # What is no scaled dot-product attention may add to its scores what no argument tells.
    expected = own_logits(model, parts.vocabulary) if before not in ("sdpa", NAME) else None
    exchanged = use_attention(model)
    if exchanged and expected is not None and not alike_logits(own_logits(model, parts.vocabulary), expected):
        transformer.set_attn_implementation(before)
        exchanged = False
    if not exchanged:
        raise LuthierError(
            f"a prefix cannot join the attention of {parts.architecture}", fix="use a prompt, LoRA or another technique"
        )

    def give(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**options, "luthier": options.get("luthier", Context())._replace(prefixes=context().prefixes)}

    backbone = model.get_submodule(parts.backbone)
    return Handle(model, backbone.register_forward_pre_hook(give, with_kwargs=True), before)


def use_attention(model: nn.Module) -> bool:
    """Give a model luthier's attention. Returns whether its attention is exchangeable."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    transformer: Any = model
    if getattr(transformer.config.get_text_config(), "attn_logit_softcapping", None):
        # Scaled dot-product attention cannot cap its scores (Gemma 2).
        return False
    try:
        transformer.set_attn_implementation(NAME)
    except (ValueError, TypeError, AttributeError):
        return False
    return bool(transformer.config._attn_implementation == NAME)


def replace_sdpa(model: nn.Module) -> None:
    """Give a model luthier's attention where it would take torch's, which knows neither packed rows nor prefixes, or, for its sinks,
    one of its own."""
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if getattr(model.config, "_attn_implementation", None) == "sdpa" or sinks:
        use_attention(model)
