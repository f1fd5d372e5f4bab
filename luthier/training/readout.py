"""What a head says of whole rows: one of their last hidden states, the head's numbers of it, and several scores as one."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from luthier.errors import LuthierError, nearest
from luthier.kinds import Batch, Combine, Head, Pool, Tensors
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
    by_word = head.pool == "words"
    state_BD = hidden_BTD[words_of(batch)] if by_word else pooled(hidden_BTD, batch.own_tokens(), pool_of(head, causal=causal))
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
    place_B = own_BT.long().argmax(1) if pool == "first" else (time_T * own_BT).argmax(1)
    return hidden_BTD[torch.arange(len(place_B), device=place_B.device), place_B]


class Combination(NamedTuple):
    """How the scores of several reward models, or members of one, become one."""

    how: Combine = "mean"
    deviations: float = 1.0
    """Of `mean_minus_deviation`: how many standard deviations of the members are subtracted, the whole of them divided by their number."""

    def check(self, members: int, centered: bool) -> None:
        """Refuse what depends on where each member's scores lie, unless that was made comparable.

        Raises:
            LuthierError: the members' scores are known up to a constant, and the combination compares them.
        """
        if self.how != "mean" and members > 1 and not centered:
            raise LuthierError(
                f"`{self.how}` compares members whose scores are known up to a constant: they were trained without centering",
                where="combine",
                fix="use the mean, standardize the scores where answers are picked, or train with `center_rewards_coefficient` above 0",
            )

    def of(self, score_RK: Tensor) -> Tensor:
        """One score a row, [R], from those of K members."""
        if self.how == "min":
            return score_RK.amin(1)
        if self.how == "median":
            # Between the two in the middle, where torch's own median takes the lower one.
            return score_RK.quantile(0.5, dim=1)
        mean_R = score_RK.mean(1)
        return mean_R if self.how == "mean" else mean_R - self.deviations * score_RK.std(1, correction=0)


MEAN = Combination()


def combination(how: str | None = None, deviations: float | None = None, where: str = "combine") -> Combination:
    """A combination by its name, the mean where there is none.

    Raises:
        LuthierError: there is no such combination, or one without a deviation is told how many to subtract.
    """
    if how is not None and how not in get_args(Combine):
        raise LuthierError(f"there is no combination `{how}`", where=where, fix=nearest(how, get_args(Combine)))
    if deviations is not None and how != "mean_minus_deviation":
        raise LuthierError(
            f"`deviations` is {deviations:g}, and the {how or 'mean'} subtracts none",
            where=where,
            fix="leave it out, or use mean_minus_deviation",
        )
    if deviations is not None and not 0.0 <= deviations < float("inf"):
        raise LuthierError(f"`deviations` is {deviations:g}", where=where, fix="use 0 or more")
    return Combination(cast(Combine, how or "mean"), 1.0 if deviations is None else deviations)
