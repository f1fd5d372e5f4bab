"""One of a model's blocks by itself, with weights that are given to it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from luthier.errors import LuthierError
from luthier.kinds import Tensors
from luthier.kinds.parts import Parts
from luthier.models.quantized import quantized

_MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def weights(model: nn.Module, parts: Parts, block: int) -> Tensors:
    """A copy of a block's weights, by their names in it.

    Raises:
        LuthierError: they are quantized, or the block is of a sort that cannot be run by itself.
    """
    module = model.get_submodule(parts.block_modules[block])
    if quantized(module):
        raise LuthierError(
            "a copy of a block cannot train where the weights are quantized",
            where=parts.block_modules[block],
            fix="use quantize: none",
        )
    _attention_of(model, parts, block)
    return {name: one.detach().clone() for name, one in module.named_parameters()}


def run(model: nn.Module, parts: Parts, block: int, weights: Tensors, hidden_BTD: Tensor, attend_BT: Tensor) -> Tensor:
    """What a block makes of hidden states, as the model itself runs it on such rows: causal, at each token's place in its row.

    It runs in evaluation mode, so without dropout; checkpointing of its own would recompute it with other weights.

    Args:
        model: a causal model.
        parts: its map.
        block: its number.
        weights: what stands in for the block's own weights, by their names in it, in any type.
        hidden_BTD: the states.
        attend_BT: True at real tokens; padding stands on one side.
    """
    module, backbone = model.get_submodule(parts.block_modules[block]), model.get_submodule(parts.backbone)
    attention, config = _attention_of(model, parts, block), model.config.get_text_config()  # type: ignore[union-attr,operator]
    padded_left = bool((attend_BT[:, 1:] & ~attend_BT[:, :-1]).any())
    position_BT = torch.arange(attend_BT.shape[1], device=attend_BT.device).expand_as(attend_BT)
    if padded_left:
        position_BT = (attend_BT.long().cumsum(-1) - 1).clamp(min=0)
    given: dict[str, Any] = {"position_ids": position_BT, "use_cache": False}
    given["attention_mask"] = _MASKS[attention](
        config=config,
        inputs_embeds=hidden_BTD,
        attention_mask=attend_BT.long() if padded_left else None,
        past_key_values=None,
        position_ids=position_BT,
    )
    rotary: Any = getattr(backbone, "rotary_emb", None)
    if rotary is not None:
        several = "layer_type" in inspect.signature(rotary.forward).parameters
        given["position_embeddings"] = rotary(hidden_BTD, position_BT, *([attention] if several else []))
    known = inspect.signature(module.forward).parameters
    cast = {name: one.to(hidden_BTD.dtype) for name, one in weights.items()}
    was_training = module.training
    module.eval()
    try:
        output = functional_call(module, cast, (hidden_BTD,), {name: one for name, one in given.items() if name in known})
    finally:
        module.train(was_training)
    states_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return states_BTD


def _attention_of(model: nn.Module, parts: Parts, block: int) -> str:
    """What transformers calls the attention of a block."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    sorts = getattr(config, "layer_types", None)
    if sorts is None:
        return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    if sorts[block] not in _MASKS:
        raise LuthierError(
            f"a block with {sorts[block]} cannot be run by itself",
            where=f"{parts.architecture}, block {block}",
            fix="use a model whose blocks attend to all tokens or to a window",
        )
    return str(sorts[block])
