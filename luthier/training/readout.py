"""What a head says of whole rows: one of their last hidden states, the head's numbers of it, and several scores as one."""

from __future__ import annotations

from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from luthier.errors import LuthierError, nearest
from luthier.kinds import Batch, Combine, Head, Tensors
from luthier.tune import Tune
from luthier.tune.forward import hidden


def read(head: Head, tensors: Tensors, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """The head's numbers of each row, [B, K], in fp32 or wider.

    Args:
        head: the head.
        tensors: its tensors.
        hidden_BTD: last hidden states of the rows' own tokens.
        batch: the rows.
    """
    state_BD = pooled(hidden_BTD, batch.attend_BT & (batch.token_ids_BT >= 0), head.pool)
    wide_BD = state_BD.to(torch.promote_types(state_BD.dtype, torch.float32))
    return head.read({name: one.to(wide_BD) for name, one in tensors.items()}, wide_BD)


def states_of(tune: Tune, batch: Batch) -> Tensor:
    """Last hidden states of a batch's own tokens, [B, T, D]."""
    return hidden(tune, batch).padded(batch.attend_BT)


def pooled(hidden_BTD: Tensor, own_BT: Tensor, pool: str) -> Tensor:
    """One state a row, [B, D]: the last own token's, or the mean of all."""
    if pool == "mean":
        weight_BT1 = own_BT[..., None].to(hidden_BTD.dtype)
        return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1.0)
    time_T = torch.arange(own_BT.shape[1], device=own_BT.device)
    last_B = (time_T * own_BT).argmax(-1)
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


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
                f"`{self.how}` compares members whose scores are known up to a constant: they were trained without centring",
                where="combine",
                mend="use the mean, standardize the scores where answers are picked, or train with `centring` above 0",
            )

    def of(self, score_RK: Tensor) -> Tensor:
        """One score a row, [R], from those of K members."""
        if self.how == "min":
            return score_RK.amin(-1)
        if self.how == "median":
            # Between the two in the middle, where torch's own median takes the lower one.
            return score_RK.quantile(0.5, dim=-1)
        mean_R = score_RK.mean(-1)
        return mean_R if self.how == "mean" else mean_R - self.deviations * score_RK.std(-1, correction=0)


MEAN = Combination()


def combination(how: str | None = None, deviations: float | None = None, where: str = "combine") -> Combination:
    """A combination by its name, the mean where there is none.

    Raises:
        LuthierError: there is no such combination, or one without a deviation is told how many to subtract.
    """
    if how is not None and how not in get_args(Combine):
        raise LuthierError(f"there is no combination `{how}`", where=where, mend=nearest(how, get_args(Combine)))
    if deviations is not None and how != "mean_minus_deviation":
        raise LuthierError(
            f"`deviations` is {deviations:g}, and the {how or 'mean'} subtracts none",
            where=where,
            mend="leave it out, or use mean_minus_deviation",
        )
    if deviations is not None and not 0.0 <= deviations < float("inf"):
        raise LuthierError(f"`deviations` is {deviations:g}", where=where, mend="use 0 or more")
    return Combination(cast(Combine, how or "mean"), 1.0 if deviations is None else deviations)
