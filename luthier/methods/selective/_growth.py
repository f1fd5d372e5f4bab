"""Where entries of sparse fine-tuning come and go (Ansell et al., 2024, section 3): by gathered gradients or by estimated momenta."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from luthier.kinds import Place, Refresh, Seen, Services, State, TrainedLike
from luthier.methods.optimizer._accumulators import accumulate_entries, accumulators
from luthier.methods.selective._entries import largest


class Exchange(NamedTuple):
    """Which slots of an index change hands, and which candidates take them."""

    slot_G: Tensor
    candidate_G: Tensor
    """Positions among the candidates."""


def exchange(index_K: Tensor, change_K: Tensor, candidate_C: Tensor, score_C: Tensor, count: int) -> Exchange:
    """Drop the least changed entries and grow the candidates of the largest scores that do not train yet.

    What is both dropped and grown keeps its slot. With too few candidates, only those that changed least go.

    Args:
        index_K: the entries that train.
        change_K: what they learned.
        candidate_C: entries that may grow.
        score_C: what they promise, of either sign.
        count: entries to exchange.
    """
    dropped = change_K.abs().argsort(stable=True)[:count]
    stays_K = torch.ones_like(index_K, dtype=torch.bool)
    stays_K[dropped] = False
    order = score_C.abs().argsort(descending=True, stable=True)
    grown = order[~torch.isin(candidate_C[order], index_K[stays_K])][:count]
    slot = dropped[~torch.isin(index_K[dropped], candidate_C[grown])]
    grown = grown[~torch.isin(candidate_C[grown], index_K)]
    return Exchange(slot[: len(grown)], grown)


def forget_gathered(state: State) -> None:
    """End a gathering phase."""
    for key in [key for key in state if key.startswith("gathered ")]:
        del state[key]


def count_entries(services: Services) -> State:
    """How many entries train at each place, for `gather`."""
    return {f"entries {one.place}": one.master.numel() for one in services.trained() if one.slot == services.slot}


def gather(state: State, place: Place, gradient_OI: Tensor) -> None:
    """Add a step's dense gradient at the candidates: the largest entries in a phase's first step, as many as train."""
    gradient = gradient_OI.reshape(-1)
    names = [f"gathered {what} {place}" for what in ("candidates", "sum", "squares", "steps")]
    if names[0] not in state:
        candidate_C = largest(gradient.abs(), state[f"entries {place}"])
        nothing = gradient.new_zeros(len(candidate_C))
        state.update(zip(names, (candidate_C, nothing, nothing, 0), strict=True))
    candidate_C, total_C, squares_C, steps = (state[name] for name in names)
    seen_C = gradient[candidate_C]
    state.update(zip(names, (candidate_C, total_C + seen_C, squares_C + seen_C.square(), steps + 1), strict=True))


def grow_by_gradient(state: State, services: Services, one: TrainedLike, count: int) -> Refresh | None:
    """Grow where the gathered gradient is large; the optimizer learns what was seen of it. None where all steps were without rows."""
    if f"gathered steps {one.place}" not in state:
        return None
    candidate_C, total_C, squares_C, steps = (
        state[f"gathered {what} {one.place}"] for what in ("candidates", "sum", "squares", "steps")
    )
    index_K, change_K = _index(one), _change(one, services)
    slot_G, grown_G = exchange(index_K, change_K, candidate_C, total_C, count)
    nothing_K = torch.zeros_like(change_K)
    seen = Seen(
        nothing_K.index_copy(0, slot_G, (total_C[grown_G] / steps).to(nothing_K)),
        nothing_K.index_copy(0, slot_G, (squares_C[grown_G] / steps).to(nothing_K)),
        steps,
    )
    return _refreshed(index_K, slot_G, candidate_C[grown_G])._replace(seen=seen)


def no_momenta(services: Services) -> State:
    """Accumulators of rows and columns for each place, at zero."""
    state: State = {}
    for one in services.trained():
        if one.slot == services.slot and one.place is not None:
            shape = services.shape(one.place)
            rows_O1, columns_1I = accumulators(shape, one.master)
            state |= {f"rows {one.place}": rows_O1, f"columns {one.place}": columns_1I}
    return state


def keep_momenta(state: State, services: Services) -> None:
    """Let the accumulators follow the gradients of the entries that train."""
    for one in services.trained():
        if one.slot == services.slot and one.gradient is not None:
            gradient_K = one.gradient.to(state[f"rows {one.place}"])
            accumulate_entries(state[f"rows {one.place}"], state[f"columns {one.place}"], _index(one), gradient_K)


def grow_by_momentum(state: State, services: Services, one: TrainedLike, count: int) -> Refresh:
    """Grow where the product of a row's and a column's accumulator is large, among entries that do not train now."""
    index_K = _index(one)
    score = (state[f"rows {one.place}"] * state[f"columns {one.place}"]).reshape(-1)
    score[index_K] = -1.0
    room = min(count, len(score) - len(index_K))
    candidate_C = largest(score, room) if room else index_K[:0]
    slot_G, grown_G = exchange(index_K, _change(one, services), candidate_C, score[candidate_C], count)
    return _refreshed(index_K, slot_G, candidate_C[grown_G])


def _index(one: TrainedLike) -> Tensor:
    assert one.index is not None
    return one.index


def _change(one: TrainedLike, services: Services) -> Tensor:
    assert one.place is not None
    return one.master - services.start_weight(one.place)


def _refreshed(index_K: Tensor, slot_G: Tensor, entry_G: Tensor) -> Refresh:
    take_K = torch.arange(len(index_K), device=index_K.device)
    return Refresh(index_K.index_copy(0, slot_G, entry_G), take_K.index_fill(0, slot_G, -1))
