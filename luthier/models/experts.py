"""Mixtures of experts: how their matrices are stored, what their routers say, and how many parameters a token passes through."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.errors import LuthierError
from luthier.kinds.parts import Parts
from luthier.models.quantized import QuantizedLinear, count, shape_of

_INPUTS_FIRST = frozenset({"Llama4TextExperts"})
"""Classes of experts that store [E, in, out] and do not say so."""

_CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
"""What routers and configurations call the number of experts that a token is sent to."""


def stores_inputs_first(module: nn.Module) -> bool:
    """Whether a module holds stacks of experts' matrices as [E, in, out] instead of [E, out, in]."""
    return type(module).__name__ in _INPUTS_FIRST or getattr(module, "is_transposed", False) is True


def is_linear(module: nn.Module) -> bool:
    """Whether a module's output is its input times its weight, and nothing else: a router chooses as well, and experts hold several
    matrices."""
    return isinstance(module, Conv1D | QuantizedLinear) or type(module).forward is nn.Linear.forward


class Router(NamedTuple):
    """A module that chooses experts."""

    module: str
    """Its dotted name."""
    block: int | None
    place: int | None
    """Which of the tensors that it returns are the logits; None: it returns them alone."""

    def logits(self, output: Any) -> Tensor:
        """The logits [N, E] for the tokens that it read, in their order, in fp32 or wider."""
        found: Tensor = output if self.place is None else output[self.place]
        return found.reshape(-1, found.shape[-1]).to(torch.promote_types(found.dtype, torch.float32))

    def chosen(self, output: Any, top_k: int) -> Tensor:
        """Where each of the tokens was sent, 0 or 1, [N, E]: as the router says, else to the likeliest experts."""
        logits_NE = self.logits(output).detach()
        said = [one for one in output if isinstance(one, Tensor) and one.dtype == torch.int64] if self.place is not None else []
        chosen_NK = said[0].reshape(len(logits_NE), -1) if said else logits_NE.topk(top_k, dim=-1).indices
        return torch.zeros_like(logits_NE).scatter(1, chosen_NK, 1.0)


def routers_of(model: nn.Module, parts: Parts) -> tuple[Router, ...]:
    """The routers of a model, by block, and where `transformers` finds their logits.

    Raises:
        LuthierError: the model has routers, and its class does not say which of their outputs are logits.
    """
    named = _routers_by_block(parts)
    if not named:
        return ()
    recorded = [
        one
        for module in model.modules()
        for listed in [(getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits")]
        for one in (listed if isinstance(listed, list | tuple) else [listed])
        if one is not None
    ]
    found = []
    for block, name in sorted(named.items(), key=lambda one: one[0] or 0):
        module = model.get_submodule(name)
        recorder = next((one for one in recorded if isinstance(module, getattr(one, "target_class", one))), None)
        place = getattr(recorder, "index", None)
        if place is None and type(module).forward is not nn.Linear.forward:
            raise LuthierError(
                f"{type(module).__name__} does not say which of its outputs are the router's logits",
                where=name,
                fix="use a family whose router_logits transformers records",
            )
        found.append(Router(name, block, place))
    return tuple(found)


def chosen_by(model: nn.Module, router: str) -> int | None:
    """How many experts a token is sent to by a router; None where neither it nor the model's configuration says."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    owner = router.rpartition(".")[0]
    for holder in (model.get_submodule(router), model.get_submodule(owner), config):
        for name in _CHOSEN:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


class Mixture(NamedTuple):
    """How much of a mixture of experts a token uses."""

    active: int
    """Parameters of the model without those of experts that a token is not sent to."""
    experts: tuple[int, ...]
    """How many experts the blocks have, each number once."""
    chosen: tuple[int, ...]
    """To how many of them a token is sent, each number once."""

    def described(self, total: int) -> str:
        """The same in words, beside the number of all parameters."""
        chosen, experts = (" or ".join(map(str, numbers)) for numbers in (self.chosen, self.experts))
        return f"{chosen} of {experts} experts for a token: {self.active:,} of {total:,} parameters are active"


def mixture_of(model: nn.Module, parts: Parts) -> Mixture | None:
    """How much of a model a token uses; None for one without experts, or where it does not say to how many a token is sent."""
    routers = _routers_by_block(parts)
    idle, experts, chosen = 0, set(), set()
    for block in range(parts.blocks):
        sizes = _experts_of(model, parts, block)
        if not sizes:
            continue
        number = len(sizes)
        sent = chosen_by(model, routers[block]) if block in routers else None
        if sent is None:
            return None
        experts.add(number)
        chosen.add(min(sent, number))
        idle += sum(sizes) * (number - min(sent, number)) // number
    return Mixture(count(model) - idle, tuple(sorted(experts)), tuple(sorted(chosen))) if experts else None


def _routers_by_block(parts: Parts) -> Mapping[int | None, str]:
    """The modules that choose experts; what weighs a shared expert chooses none."""
    places = [place for place in parts.select("router", tensor=None) if not place.module.endswith("shared_expert_gate")]
    return {place.block: place.module for place in reversed(places)}


def _experts_of(model: nn.Module, parts: Parts, block: int) -> Sequence[int]:
    """The parameters of each expert of a block."""
    sizes: dict[int, int] = {}
    for place in parts.select("expert", blocks=[block], tensor=None):
        shape = shape_of(model, place.parameter)
        alone = re.search(r"\.experts\.(\d+)\.", place.parameter)
        if alone is not None:
            sizes[int(alone[1])] = sizes.get(int(alone[1]), 0) + shape.numel()
        elif len(shape) > 1:
            for expert in range(shape[0]):
                sizes[expert] = sizes.get(expert, 0) + shape[1:].numel()
    return list(sizes.values())
