"""Heads that look further ahead than the next token: what they predict from a batch, and the blocks they are made of.

Head i, from 1, stands on the last hidden state of position t and predicts the token at t + 1 + i of the same row with the model's own
language-model head; the next token would be head 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from luthier.kinds import Batch, Tensors, View


class Ahead(NamedTuple):
    """The targets of one head among those of a view. The first has shape [N], the others [M], M of them."""

    chosen_N: Tensor
    """True where the target has a token so far before it in its row."""
    row_M: Tensor
    source_M: Tensor
    """Time index of the hidden state that predicts it."""


def ahead(view: View, head: int) -> Ahead:
    """What a head predicts, and where from."""
    source_N = view.position_N - 1 - head
    chosen_N = (source_N >= 0) & view.batch.attend_BT[view.row_N, source_N.clamp(min=0)]
    return Ahead(chosen_N, view.row_N[chosen_N], source_N[chosen_N])


def targets_ahead(batch: Batch, head: int) -> float:
    """How many targets a head has in a batch, as `ahead` finds them."""
    follows = (batch.label_BT[:, 1 + head :] >= 0) & batch.attend_BT[:, head:-1]
    return float((follows & batch.attend_BT[:, : -1 - head]).sum())


def residual_blocks(heads: int, width: int) -> Tensors:
    """One residual block x + SiLU(W x + b) a head, which starts as the identity: W [D, D] and b [D] are zero."""
    blocks: Tensors = {}
    for head in range(1, heads + 1):
        blocks[weight_of(head)], blocks[bias_of(head)] = torch.zeros(width, width), torch.zeros(width)
    return blocks


def weight_of(head: int) -> str:
    """The name of a head's W."""
    return f"ahead_{head}_weight_DD"


def bias_of(head: int) -> str:
    """The name of a head's b."""
    return f"ahead_{head}_bias_D"


def is_head(name: str) -> bool:
    """Whether a trained tensor of this name belongs to such a head."""
    return ".ahead_" in name


def residual(hidden_MD: Tensor, weight_DD: Tensor, bias_D: Tensor) -> Tensor:
    """A residual block, in the type of the hidden states."""
    inner_MD = functional.linear(hidden_MD, weight_DD.to(hidden_MD.dtype), bias_D.to(hidden_MD.dtype))
    return hidden_MD + functional.silu(inner_MD)


def loss_ahead(view: View, own: Tensors, head: int) -> Tensor:
    """A head's negative log-likelihood, summed over its targets, each times the weight of the token that is predicted.

    The head is recomputed in backward: the logits of several heads never exist together.
    """
    services, hidden_BTD = view.services, view.hidden_BTD
    assert services is not None and hidden_BTD is not None
    found = ahead(view, head)
    label_M, weight_M = view.label_N[found.chosen_N], view.weight_N[found.chosen_N]

    def make(hidden_MD: Tensor, weight_DD: Tensor, bias_D: Tensor) -> Tensor:
        nll_M = services.nll(residual(hidden_MD, weight_DD, bias_D), label_M)
        return (nll_M * weight_M).sum()

    hidden_MD = hidden_BTD[found.row_M, found.source_M]
    loss: Tensor = checkpoint(make, hidden_MD, own[weight_of(head)], own[bias_of(head)], use_reentrant=False)
    return loss
