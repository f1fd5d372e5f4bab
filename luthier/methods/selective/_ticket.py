"""A lottery ticket: the numbers that moved most, which train again from where they began."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Refresh, Services, State, TrainedLike
from luthier.kinds.parts import outputs_first
from luthier.methods.selective._entries import largest


def most_changed(size: Sequence[Tensor], count: int) -> list[Tensor]:
    """Where the `count` largest of all numbers of several tensors stand, by tensor, in rising order; zeros never.

    Args:
        size: how far each number moved, flat.
        count: K.
    """
    together = torch.cat([one.reshape(-1) for one in size])
    chosen = largest(together, min(count, len(together))) if count > 0 else together.new_zeros(0, dtype=torch.int64)
    chosen = chosen[together[chosen] > 0]
    starts = torch.tensor([0, *accumulate(one.numel() for one in size)][:-1], device=chosen.device)
    pieces = torch.tensor_split(chosen, torch.searchsorted(chosen, starts[1:]).cpu())
    return [piece - start for piece, start in zip(pieces, starts, strict=True)]


def ticket(state: State, services: Services, mine: Sequence[TrainedLike], share: float) -> dict[Place, Refresh]:
    """Keep what trains already, add what moved most beside it, and go back to where the iteration began."""
    numbers = sum(services.shape(one.place).numel() for one in mine if one.place is not None)
    size = [_moved(state, services, one).abs() for one in mine]
    held = sum(len(_held(state, one)[0]) for one in mine)
    new = most_changed(size, max(1, int(share * numbers)) - held)
    if not held and not any(map(len, new)):
        raise LuthierError("nothing moved in the first phase", where="lt_sft", fix="raise the learning rate or `first`")
    changed = {}
    for one, joining in zip(mine, new, strict=True):
        index, learnt = _held(state, one)
        both = torch.cat([index, joining])
        order = both.argsort()
        values = torch.cat([learnt, learnt.new_zeros(len(joining))])[order]
        state |= {f"index {one.place}": both[order], f"learnt {one.place}": values}
        assert one.place is not None
        changed[one.place] = _refreshed(both[order], values)
    return changed


def everything(state: State, services: Services, mine: Sequence[TrainedLike]) -> dict[Place, Refresh]:
    """Train all numbers again, from what the ticket learned."""
    changed = {}
    for one in mine:
        assert one.place is not None and one.index is not None and one.anchor is not None
        index = state[f"index {one.place}"]
        learnt = (one.master.detach() - one.anchor)[: len(index)]
        state[f"learnt {one.place}"] = learnt
        size = services.shape(one.place).numel()
        everywhere = learnt.new_zeros(size).index_copy(0, index, learnt)
        changed[one.place] = _refreshed(torch.arange(size, device=index.device), everywhere)
    return changed


def _refreshed(index: Tensor, learnt: Tensor) -> Refresh:
    # A selection cannot be empty: where nothing is chosen, one entry stands still.
    if not len(index):
        index = index.new_zeros(1)
    return Refresh(index, torch.full_like(index, -1), seed=learnt if learnt.any() else None, form="flat")


def _held(state: State, one: TrainedLike) -> tuple[Tensor, Tensor]:
    """The entries chosen so far, and what they had learned when this iteration began."""
    nothing = torch.zeros(0, dtype=torch.int64, device=one.master.device)
    return state.get(f"index {one.place}", nothing), state.get(f"learnt {one.place}", one.master.new_zeros(0))


def _moved(state: State, services: Services, one: TrainedLike) -> Tensor:
    """How far every number moved since the iteration began, flat as [O, I]; 0 for those chosen already."""
    assert one.place is not None and one.anchor is not None
    change = one.master.detach() - one.anchor
    flat = (outputs_first(change, one.place, services.parts.transposed) if one.form == "whole" else change).reshape(-1)
    return flat.index_fill(0, _held(state, one)[0], 0.0)
