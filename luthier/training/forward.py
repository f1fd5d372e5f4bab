"""The forward passes of a run: hidden states of the tuned model, and of the base."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Batch
from luthier.models.attention import Context
from luthier.models.head import finish
from luthier.tune import Tune
from luthier.tune.trained import read, write


class Hidden(NamedTuple):
    """Last hidden states of a batch, without what trained prompts put before the rows."""

    values: Tensor
    """[B, T, D], or [N, D] where the rows were packed."""
    place_BT: Tensor | None = None
    """Where each real token of a packed batch stands in `values`."""

    def at(self, row_N: Tensor, time_N: Tensor) -> Tensor:
        """The states [N, D] at these tokens."""
        if self.place_BT is None:
            return self.values[row_N, time_N]
        return self.values[self.place_BT[row_N, time_N]]

    def padded(self, attend_BT: Tensor) -> Tensor:
        """All of them [B, T, D], zero where a packed batch has no token."""
        if self.place_BT is None:
            return self.values
        spread = self.values[self.place_BT.clamp(min=0)]
        return torch.where(attend_BT[..., None], spread, torch.zeros((), dtype=spread.dtype, device=spread.device))


def hidden(tune: Tune, batch: Batch, *, pack: bool = False) -> Hidden:
    """Run the model's body on a batch.

    A causal model with padding on the right needs no mask: no real token can see the padding behind it.

    Args:
        tune: the model, with what is attached to it.
        batch: the rows.
        pack: leave the padding out and run the real tokens one behind the other.
    """
    ids_BT, attend_BT = batch.token_ids_BT, batch.attend_BT
    virtual = bool((ids_BT < 0).any())
    # Rows with virtual tokens of their own hold the prompt already.
    length = 0 if tune.is_off or virtual else tune.prompt_length
    if tune.is_off and virtual:
        attend_BT = attend_BT & (ids_BT >= 0)
        ids_BT = ids_BT.clamp(min=0)
    if length:
        before = -1 - torch.arange(length, device=ids_BT.device)
        ids_BT = torch.cat([before.expand(len(ids_BT), -1), ids_BT], dim=1)
        attend_BT = torch.cat([attend_BT.new_ones(len(attend_BT), length), attend_BT], dim=1)
    backbone = tune.model.get_submodule(tune.parts.backbone)
    if pack and not bool(attend_BT.all()):
        place_BT = (attend_BT.flatten().cumsum(0) - 1).view_as(attend_BT)
        return Hidden(_packed(backbone, ids_BT, attend_BT), place_BT[:, length:])
    arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": None, "use_cache": False}
    padded_left = bool((attend_BT[:, 1:] & ~attend_BT[:, :-1]).any())
    if padded_left or not tune.parts.causal:
        arguments["attention_mask"] = attend_BT.long()
        arguments["position_ids"] = (attend_BT.long().cumsum(-1) - 1).clamp(min=0)
    output = backbone(**_accepted(backbone, arguments))
    hidden_BTD: Tensor = output.last_hidden_state
    return Hidden(hidden_BTD[:, length:] if length else hidden_BTD)


def _packed(backbone: torch.nn.Module, ids_BT: Tensor, attend_BT: Tensor) -> Tensor:
    """Last hidden states [N, D] of the real tokens alone."""
    position_BT = attend_BT.long().cumsum(-1) - 1
    output = backbone(
        input_ids=ids_BT[attend_BT][None],
        position_ids=position_BT[attend_BT][None],
        # One that is ready made, so that none is made; attention is told the lengths and looks at no mask.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids_BT.device),
        use_cache=False,
        luthier=Context(lengths=tuple(attend_BT.sum(-1).tolist())),
    )
    hidden_ND: Tensor = output.last_hidden_state[0]
    return hidden_ND


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
