"""Packed rows: which tokens of a batch are run, one behind the other, and where each token's state stands among them.

Rows of a group that begin with the same tokens, such as two answers to one prompt, have the same states there: these are run with the
group's first row, and its other rows go on from them. That is exact as long as nothing tells the rows apart before they differ, which is
for who asks to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.models.attention import Context, Shared


class Packed(NamedTuple):
    """A batch without padding, and without what it would run twice."""

    run_BT: Tensor
    """True at tokens that are run."""
    position_BT: Tensor
    """Places in the row, from 0, right where a token is real."""
    place_BT: Tensor
    """Where each real token's state stands among those that are run."""
    context: Context
    """What attention must know."""


def pack(ids_BT: Tensor, attend_BT: Tensor, groups: Sequence[tuple[int, ...]] = ()) -> Packed:
    """Lay rows one behind the other.

    Args:
        ids_BT: what the model reads.
        attend_BT: True at real tokens.
        groups: places of rows whose common beginning with the first of them is run once.
    """
    position_BT = attend_BT.long().cumsum(-1) - 1
    first_B = _firsts(groups, len(ids_BT)).to(ids_BT.device)
    shared_B = common_beginnings(ids_BT, attend_BT, first_B) if groups else torch.zeros_like(first_B)
    run_BT = attend_BT & (position_BT >= shared_B[:, None])
    run_B = run_BT.sum(-1)
    begin_B = run_B.cumsum(0) - run_B
    # A row that shares its beginning has that in front of its own tokens.
    before_B1, own_B1 = begin_B[first_B][:, None], (begin_B - shared_B)[:, None]
    place_BT = position_BT + torch.where(position_BT < shared_B[:, None], before_B1, own_B1)
    rows = list(zip(*torch.stack([run_B, first_B, shared_B]).tolist(), strict=True))
    return Packed(run_BT, position_BT, place_BT, _context(rows))


def _firsts(groups: Sequence[tuple[int, ...]], rows: int) -> Tensor:
    """The place of the first row of each row's group, [B]; its own where it stands alone."""
    first = list(range(rows))
    for group in groups:
        for place in group:
            first[place] = group[0]
    return torch.tensor(first, dtype=torch.int64)


def common_beginnings(ids_BT: Tensor, attend_BT: Tensor, first_B: Tensor) -> Tensor:
    """How many tokens each row begins with that another begins with as well, [B]; 0 for that one itself.

    Args:
        ids_BT: token ids.
        attend_BT: True at real tokens; padding may stand on either side.
        first_B: the other row's place.
    """
    rows, time = ids_BT.shape
    if not time:
        return torch.zeros_like(first_B)
    number_T = torch.arange(time, device=ids_BT.device)
    time_BT = attend_BT.long().argmax(-1)[:, None] + number_T
    inside_BT = time_BT < time
    time_BT = time_BT.clamp(max=time - 1)
    real_BT, token_BT = attend_BT.gather(1, time_BT) & inside_BT, ids_BT.gather(1, time_BT)
    same_BT = real_BT & real_BT[first_B] & (token_BT == token_BT[first_B])
    is_other_B = first_B != torch.arange(rows, device=first_B.device)
    return same_BT.long().cumprod(-1).sum(-1) * is_other_B


def _context(rows: Sequence[tuple[int, int, int]]) -> Context:
    """Of each row the tokens that are run, its group's first row, and the tokens that it shares with that."""
    # A row that is all shared has no query.
    kept = [place for place, (run, _, _) in enumerate(rows) if run]
    number = {place: i for i, place in enumerate(kept)}
    lengths = tuple(rows[place][0] for place in kept)
    shared = tuple(Shared(number[rows[i][1]], rows[i][2]) if rows[i][2] else Shared() for i in kept)
    return Context(lengths=lengths, shared=shared if any(one.tokens for one in shared) else ())
