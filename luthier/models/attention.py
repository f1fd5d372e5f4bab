"""The owner of attention: trained keys and values join here.

A prefix through `past_key_values` is lost under gradient checkpointing, so luthier has an attention function of its own, on top of
scaled dot-product attention. What it needs travels as an argument of the forward pass: state on modules would be read by the
recomputation of another micro-batch, and would make compiled models recompile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.errors import LuthierError
from luthier.models.parts import Parts

NAME = "luthier"


class Context(NamedTuple):
    """What attention must know in one forward pass."""

    prefixes: tuple[tuple[dict[str, Tensor], Callable[[dict[str, Tensor], int], tuple[Tensor, Tensor]]], ...] = ()
    """Trained tensors and the function that makes a block's keys and values of them, [H, P, width of a head] each."""


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
    """Scaled dot-product attention in which every query may also attend to the prefixes. Shapes are [B, H, T, width of a head]."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if luthier is None or not luthier.prefixes:
        return plain(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    if attention_mask is None:
        attention_mask = _causal(query.shape[2], key.shape[2], query.device)
    for tensors, keyvalue in luthier.prefixes:
        key_HPD, value_HPD = keyvalue(tensors, int(module.layer_idx))  # type: ignore[arg-type]
        key = torch.cat([key_HPD.to(key.dtype).expand(len(key), -1, -1, -1), key], dim=2)
        value = torch.cat([value_HPD.to(value.dtype).expand(len(value), -1, -1, -1), value], dim=2)
        open_mask = torch.ones if attention_mask.dtype == torch.bool else torch.zeros
        room = open_mask(
            *attention_mask.shape[:-1], key_HPD.shape[1], dtype=attention_mask.dtype, device=attention_mask.device
        )
        attention_mask = torch.cat([room, attention_mask], dim=-1)
    return plain(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    here = torch.arange(keys - queries, keys, device=device)
    return (torch.arange(keys, device=device)[None, :] <= here[:, None])[None, None]


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False})


def use_context(model: nn.Module, parts: Parts, context: Callable[[], Context]) -> Handle:
    """Let a model's attention ask for a context at every forward pass.

    Raises:
        LuthierError: the model does not use the exchangeable attention of transformers, so a prefix would be ignored.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    transformer: Any = model
    before = transformer.config._attn_implementation
    try:
        transformer.set_attn_implementation(NAME)
    except (ValueError, TypeError, AttributeError) as error:
        raise LuthierError(
            f"a prefix cannot join the attention of {parts.architecture}", where=str(error), mend="use a prompt or LoRA"
        ) from error

    def give(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**options, "luthier": context()}

    backbone = model.get_submodule(parts.backbone)
    return Handle(model, backbone.register_forward_pre_hook(give, with_kwargs=True), before)
