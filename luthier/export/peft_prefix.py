"""Prefix tuning in PEFT's form, with keys turned to where PEFT's tokens look for them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from luthier.errors import LuthierError
from luthier.export.model import outputs
from luthier.export.peft_adapter import Adapter
from luthier.models.modes import evaluating
from luthier.tune import Tune

INSTEAD = "train prompt_tuning instead, or export the weights without it: --as model --weights-only"


def prefix_adapter(tune: Tune) -> Adapter:
    """The keys and values that a prefix's tensors make, as PREFIX_TUNING without a projection.

    In luthier a prefix stands at no position. PEFT counts its P keys among the positions, so that every token stands P further on.
    Rotations only know differences: keys that are turned by P give every query the same scores.

    Raises:
        LuthierError: positions are learned, or change with the length of the row; blocks look back a part of the row only; or the
            logits with PEFT's cache are others than luthier's.
    """
    _refuse_positions(tune)
    ((own, prefix),) = tune.prefixes
    pairs = [prefix.keyvalue(own.masters(), block) for block in range(tune.parts.blocks)]
    key_LHPW, value_LHPW = (torch.stack(one) for one in zip(*pairs, strict=True))
    turned_LHPW = _turned(tune, key_LHPW)
    _check(tune, turned_LHPW, value_LHPW)
    blocks, heads, length, width = key_LHPW.shape
    both_PL2HW = torch.stack([turned_LHPW, value_LHPW], dim=1).permute(3, 0, 1, 2, 4)
    config = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        "num_layers": blocks,
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "encoder_hidden_size": heads * width,
    }
    return Adapter(config, {"prompt_embeddings": both_PL2HW.reshape(length, -1)}, {"tokens": length})


def _refuse_positions(tune: Tune) -> None:
    """Raise where a prefix among the positions cannot be made up for."""
    config = _config(tune)
    kinds = getattr(config, "layer_types", None)
    looks_back_partly = set(kinds) != {"full_attention"} if kinds else getattr(config, "sliding_window", None) is not None
    rotary = _rotary(tune)
    kind = str(getattr(rotary, "rope_type", "default"))
    if looks_back_partly:
        what = "some blocks look back a part of the row only, which in PEFT leaves the prefix behind"
    elif rotary is None:
        what = "PEFT moves every token on by the length of the prefix, and this model reads tokens differently at other positions"
    elif kind == "longrope" or "dynamic" in kind:
        what = f"PEFT counts the prefix among the positions, and rotations of type `{kind}` change with their number"
    else:
        return
    raise LuthierError(what, where=tune.parts.architecture, fix=INSTEAD)


def _config(tune: Tune) -> Any:
    model: Any = tune.model
    return model.config.get_text_config()


def _rotary(tune: Tune) -> Any:
    """What makes a model's rotations; None where positions are something else."""
    rotary = getattr(tune.model.get_submodule(tune.parts.backbone), "rotary_emb", None)
    known = hasattr(rotary, "attention_scaling") and hasattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb")
    return rotary if known else None


def _turned(tune: Tune, key_LHPW: Tensor) -> Tensor:
    """Keys rotated as those of a token at position P, in the model's own way."""
    rotary = _rotary(tune)
    length = key_LHPW.shape[2]
    cos_11W, sin_11W = rotary(key_LHPW, torch.tensor([[length]], device=key_LHPW.device))
    # Some rotations also stretch (YaRN), as they do with queries here and there: it is no part of the turn.
    cos_11W, sin_11W = cos_11W / rotary.attention_scaling, sin_11W / rotary.attention_scaling
    rotate = sys.modules[type(rotary).__module__].apply_rotary_pos_emb
    # Some models turn the first channels of a head only.
    first, rest = key_LHPW.split([cos_11W.shape[-1], key_LHPW.shape[-1] - cos_11W.shape[-1]], dim=-1)
    _, turned = rotate(first, first, cos_11W, sin_11W)
    turned_LHPW = torch.cat([turned, rest], dim=-1)
    rotated = getattr(_config(tune), "no_rope_layers", None)
    if rotated is None:
        return turned_LHPW
    is_rotated_L111 = torch.tensor(rotated, device=key_LHPW.device).bool()[:, None, None, None]
    return torch.where(is_rotated_L111, turned_LHPW, key_LHPW)


def _check(tune: Tune, key_LHPW: Tensor, value_LHPW: Tensor) -> None:
    """Let the base read the keys and values from a cache, as PEFT does, and compare the logits."""
    model: Any = tune.model
    ids = list(range(min(32, tune.parts.vocabulary)))
    (expected_TV,) = outputs(model, [ids])
    live = next(model.parameters())
    cache = DynamicCache()
    for block, (key_HPW, value_HPW) in enumerate(zip(key_LHPW, value_LHPW, strict=True)):
        cache.update(key_HPW[None].to(live), value_HPW[None].to(live), block)
    with evaluating(model), tune.off():
        found_TV = model(input_ids=torch.tensor([ids], device=live.device), past_key_values=cache).logits[0].to(expected_TV)
    difference = float((found_TV - expected_TV).abs().max())
    # Rotations are computed in fp32.
    precision = max(torch.finfo(live.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = precision**0.5 * max(1.0, float(expected_TV.abs().max()))
    if not difference <= allowed:
        raise LuthierError(
            f"PEFT would compute other logits with this prefix: they differ by {difference:g}, where rounding explains {allowed:g}",
            where=tune.parts.architecture,
            fix=INSTEAD,
        )
