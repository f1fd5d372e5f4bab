"""A random share of each row's targets: the control of every rule that chooses tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier import draws, logprobs
from luthier.errors import LuthierError
from luthier.kinds import Batch, Column, TokenWeight, View
from luthier.registry import method

DRAW = Column("random_tokens", lambda chunk: draws.uniform(chunk.key_C), gradient=False)


@method(title="Random tokens", reduces_to="share 1: plain cross-entropy")
def random_tokens(*, share: float = 0.6) -> TokenWeight:
    """Learn from as many of each row's targets as a rule that chooses would keep, but chosen by chance, anew in every step.

    Args:
        share: of each row's targets that is kept, rounded up.

    Raises:
        LuthierError: the share is not above 0 and at most 1.
    """
    if not 0.0 < share <= 1.0:
        raise LuthierError(f"`share` is {share}", where="random_tokens: share", mend="use more than 0 and at most 1")

    def weigh(view: View) -> Tensor:
        count_B = view.targets_by_row()
        order_N = view[DRAW.name].argsort()
        order_N = order_N[view.row_N[order_N].argsort(stable=True)]
        sorted_N = view.row_N[order_N]
        rank_N = torch.arange(len(order_N), device=order_N.device) - (count_B.cumsum(0) - count_B)[sorted_N]
        kept_N = torch.empty_like(rank_N, dtype=torch.bool)
        kept_N[order_N] = rank_N < kept(count_B, share)[sorted_N]
        return kept_N.to(view["nll"])

    def count(batch: Batch) -> float:
        return float(kept(logprobs.targets(batch).row_N.bincount(), share).sum())

    return TokenWeight(weigh, ("nll", DRAW), count)


def kept(count_B: Tensor, share: float) -> Tensor:
    """How many targets of each row are kept: `share` of them rounded up, but 55 of 100 at 0.55, whose product in fp64 is above 55."""
    return (share * count_B.double() - 1e-9).ceil().long()
