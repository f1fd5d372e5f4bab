"""The forward passes of a run: hidden states of the tuned model, and of the base."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Batch
from luthier.models.head import finish
from luthier.tune import Tune
from luthier.tune.trained import read, write


def hidden(tune: Tune, batch: Batch) -> Tensor:
    """Last hidden states [B, T, D] of a batch; what trained prompts put before the rows is cut off again.

    A causal model with padding on the right needs no mask: no real token can see the padding behind it.
    """
    ids_BT, attend_BT = batch.token_ids_BT, batch.attend_BT
    length = 0 if tune.is_off else tune.prompt_length
    virtual = bool((ids_BT < 0).any())
    if tune.is_off and virtual:
        attend_BT = attend_BT & (ids_BT >= 0)
        ids_BT = ids_BT.clamp(min=0)
    if length:
        before = -1 - torch.arange(length, device=ids_BT.device)
        ids_BT = torch.cat([before.expand(len(ids_BT), -1), ids_BT], dim=1)
        attend_BT = torch.cat([attend_BT.new_ones(len(attend_BT), length), attend_BT], dim=1)
    arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": None, "use_cache": False}
    padded_left = bool((attend_BT[:, 1:] & ~attend_BT[:, :-1]).any())
    if padded_left or not tune.parts.causal:
        arguments["attention_mask"] = attend_BT.long()
        arguments["position_ids"] = (attend_BT.long().cumsum(-1) - 1).clamp(min=0)
    backbone = tune.model.get_submodule(tune.parts.backbone)
    output = backbone(**_accepted(backbone, arguments))
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD[:, length:]


def _accepted(module: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(module.forward).parameters
    return {name: value for name, value in arguments.items() if name in known}


def base_head(tune: Tune) -> Callable[[Tensor], Tensor]:
    """The base's head, without swapping the model: hidden states to logits."""
    module: Any = tune.model.get_submodule(tune.parts.head)
    weight = _base_value(tune, tune.parts.ties.get(tune.parts.head, tune.parts.head), "weight", module.weight)
    bias = getattr(module, "bias", None)
    bias = None if bias is None else _base_value(tune, tune.parts.head, "bias", bias)
    after = finish(tune.model)
    return lambda hidden_ND: after(functional.linear(hidden_ND, weight, bias))


def _base_value(tune: Tune, module: str, tensor: str, live: Tensor) -> Tensor:
    name = f"{module}.{tensor}"
    if name in tune.altered:
        return tune.altered[name]
    value = live.detach()
    for one in tune.trained.values():
        if one.place is None or one.place.parameter != name or one.form in ("factor", "free") or one.start is None:
            continue
        if one.form == "whole":
            return one.start
        value = value.clone()
        rows = value[one.place.start : one.place.stop]
        write(rows, one.form, one.index, one.start.to(read(rows, one.form, one.index).dtype))
    return value
