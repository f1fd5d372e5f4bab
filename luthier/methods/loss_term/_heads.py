"""Heads that look further ahead than the next token: what they predict from a batch, and what they are made of.

Head i, from 1, stands on the last hidden state of position t and predicts the token at t + 1 + i of the same row with the model's own
language-model head; the next token would be head 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from luthier.kinds import Batch, Services, Tensors, View


class Ahead(NamedTuple):
    """The labels of one head among those of a view. The first has shape [N], the others [M], M of them."""

    chosen_N: Tensor
    """True where the label has a token so far before it in its row."""
    row_M: Tensor
    source_M: Tensor
    """Time index of the hidden state that predicts it."""


def ahead(view: View, head: int) -> Ahead:
    """What a head predicts, and where from."""
    source_N = view.position_N - 1 - head
    chosen_N = (source_N >= 0) & view.batch.attend_BT[view.row_N, source_N.clamp(min=0)]
    return Ahead(chosen_N, view.row_N[chosen_N], source_N[chosen_N])


def targets_ahead(batch: Batch, head: int) -> float:
    """How many labels a head has in a batch, as `ahead` finds them."""
    follows = (batch.label_BT[:, 1 + head :] >= 0) & batch.attend_BT[:, head:-1]
    return float((follows & batch.attend_BT[:, : -1 - head]).sum())


class Make(NamedTuple):
    """What a head is made of: `start(services)` gives its tensors, `states(view, tensors, found)` hidden states [M, D] of them."""

    start: Callable[[Services], Tensors]
    states: Callable[[View, Tensors, Ahead], Tensor]


def _zeros(services: Services) -> Tensors:
    width = services.parts.width
    return {"weight_DD": torch.zeros(width, width), "bias_D": torch.zeros(width)}


def _residual(view: View, tensors: Tensors, found: Ahead) -> Tensor:
    assert view.hidden_BTD is not None
    hidden_MD = view.hidden_BTD[found.row_M, found.source_M]
    weight_DD, bias_D = (tensors[name].to(hidden_MD.dtype) for name in ("weight_DD", "bias_D"))
    return hidden_MD + functional.silu(functional.linear(hidden_MD, weight_DD, bias_D))


def _copied(services: Services) -> int:
    """The block whose weights a head starts with: the last but one."""
    return max(0, services.parts.blocks - 2)


def _block(view: View, tensors: Tensors, found: Ahead) -> Tensor:
    assert view.hidden_BTD is not None and view.services is not None
    services = view.services
    states_BTD = services.run_block(_copied(services), tensors, view.hidden_BTD, view.batch.attend_BT)
    return states_BTD[found.row_M, found.source_M]


MAKES: Mapping[str, Make] = {
    "residual": Make(_zeros, _residual),
    "block": Make(lambda services: services.block(_copied(services)), _block),
}
"""`residual`: x + SiLU(W x + b), the identity where W and b are zero. `block`: a copy of one of the model's own blocks."""


def _prefix(head: int) -> str:
    return f"ahead_{head}_"


def is_head(name: str) -> bool:
    """Whether a trained tensor of this name belongs to such a head."""
    return ".ahead_" in name


def start_heads(make: Make, heads: int, services: Services) -> Tensors:
    """The tensors of all heads."""
    return {f"{_prefix(head)}{name}": one for head in range(1, heads + 1) for name, one in make.start(services).items()}


def loss_ahead(make: Make, view: View, own: Tensors, head: int) -> Tensor:
    """A head's negative log-likelihood, summed over its labels, each times the weight of the token that is predicted.

    The head is recomputed in backward: the logits of several heads never exist together.
    """
    services = view.services
    assert services is not None
    found = ahead(view, head)
    label_M, weight_M = view.label_N[found.chosen_N], view.weight_N[found.chosen_N]
    before = _prefix(head)
    names = [name for name in own if name.startswith(before)]

    def total(*tensors: Tensor) -> Tensor:
        mine = {name.removeprefix(before): one for name, one in zip(names, tensors, strict=True)}
        return (services.nll(make.states(view, mine, found), label_M) * weight_M).sum()

    loss: Tensor = checkpoint(total, *(own[name] for name in names), use_reentrant=False)
    return loss
