"""What a head says of whole rows: one of their last hidden states, and the head's numbers of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from luthier.kinds import Batch, Head, Pool, Tensors
from luthier.rows.spans import WORD
from luthier.tune import Tune
from luthier.tune.forward import hidden


def read(head: Head, tensors: Tensors, hidden_BTD: Tensor, batch: Batch, *, causal: bool = True) -> Tensor:
    """The head's numbers of each row, [B, K], or of each word, [N, K], in fp32 or wider.

    Args:
        head: the head.
        tensors: its tensors.
        hidden_BTD: last hidden states of the rows' own tokens.
        batch: the rows.
        causal: whether the model is a causal one.
    """
    if head.pool == "words":
        state_BD = hidden_BTD[words_of(batch)]
    else:
        state_BD = pooled(hidden_BTD, batch.attend_BT & (batch.token_ids_BT >= 0), pool_of(head, causal=causal))
    wide_BD = state_BD.to(torch.promote_types(state_BD.dtype, torch.float32))
    return head.read({name: one.to(wide_BD) for name, one in tensors.items()}, wide_BD)


def states_of(tune: Tune, batch: Batch) -> Tensor:
    """Last hidden states of a batch's own tokens, [B, T, D]."""
    return hidden(tune, batch).padded(batch.attend_BT)


def words_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and time of each word's first token, [N] each, row by row."""
    word_BT = batch.token_columns.get(WORD)
    begins_BT = torch.zeros_like(batch.attend_BT) if word_BT is None else (word_BT > 0) & batch.attend_BT
    row_N, time_N = begins_BT.nonzero(as_tuple=True)
    return row_N, time_N


def pool_of(head: Head, *, causal: bool) -> Pool | Literal["words"]:
    """What a head reads, where that depends on the model."""
    return ("last" if causal else "first") if head.pool == "auto" else head.pool


def pooled(hidden_BTD: Tensor, own_BT: Tensor, pool: str) -> Tensor:
    """One state a row, [B, D]: the first own token's, the last one's, or the mean of all."""
    if pool == "mean":
        weight_BT1 = own_BT[..., None].to(hidden_BTD.dtype)
        return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1.0)
    time_T = torch.arange(own_BT.shape[1], device=own_BT.device)
    place_B = own_BT.long().argmax(-1) if pool == "first" else (time_T * own_BT).argmax(-1)
    return hidden_BTD[torch.arange(len(place_B), device=place_B.device), place_B]
