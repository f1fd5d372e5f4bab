"""The labels of a whole step as rules see them: gathered over micro-batches and processes, and what is left of each micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from luthier import draws, machine
from luthier.columns.targets import find_targets
from luthier.kinds import Batch, Column, Now, State
from luthier.training.services import view_of
from luthier.training.world import World
from luthier.tune import Tune


def table_of(tune: Tune, batch: Batch, wanted: Sequence[Column], now: Now, states: Mapping[str, State]) -> dict[str, Tensor]:
    """The rows' own labels of one micro-batch; free columns of its rows under `rows NAME`."""
    where = find_targets(batch.own())
    rows_B = draws.seeds_of(batch.row_ids)
    row_N = where.row_N.cpu()
    here = {"row": rows_B[row_N], "position": where.source_N.cpu() + 1}
    for name, numbers in batch.columns.items():
        here[f"rows {name}"] = machine.widened(numbers.cpu())[row_N]
    for name, texts in batch.texts.items():
        here[f"rows {name}"] = draws.seeds_of(draws.names_of(texts, batch.columns.get(name)))[row_N]
    if wanted:
        view = view_of(tune, batch, wanted, now, remembered=states).of_own()
        here.update({name: column.float().cpu() for name, column in view.columns.items()})
    return here


def gathered(
    tables: Sequence[dict[str, Tensor]], wanted: Sequence[str], world: World
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All processes' labels, sorted by row and position, and the free columns of their rows at each.

    Micro-batches differ in the free columns that their rows have.
    """
    kinds = [(name, str(values.dtype)) for table in tables for name, values in table.items() if name.startswith("rows ")]
    everyone = world.gather_plain(kinds)
    # Where some rows have texts and others numbers, all are names: of two kinds the later in the alphabet, int64, is that of texts.
    free = dict(sorted(one for kinds in everyone for one in kinds))
    local: dict[str, Tensor] = {}
    for name in ("row", "position", *wanted):
        kind = torch.int64 if name in ("row", "position") else torch.float32
        local[name] = torch.cat([torch.zeros(0, dtype=kind), *(table[name] for table in tables)])
    for name, spelled in free.items():
        is_number = spelled == "torch.float64"
        nothing = torch.tensor(float("nan"), dtype=torch.float64) if is_number else torch.tensor(draws.seed_of(""))
        pieces = [table.get(name, nothing.expand(len(table["row"]))) for table in tables]
        if nothing.dtype == torch.int64:
            pieces = [draws.seeds_of_numbers(one) if one.is_floating_point() else one for one in pieces]
        local[name] = torch.cat([nothing.new_zeros(0), *pieces])
    whole = world.gather(local)
    order = _sorted(whole)
    table = {name: values[order] for name, values in whole.items()}
    return table, {name.removeprefix("rows "): table[name] for name in free}


def places_in(whole: dict[str, Tensor], some: dict[str, Tensor]) -> Tensor:
    """Where some labels are among all, which are sorted by row and position."""
    row_R, row_M = whole["row"].unique(return_inverse=True)
    longest = int(whole["position"].max()) + 1 if len(row_M) else 1
    key_M = row_M * longest + whole["position"]
    return torch.searchsorted(key_M, torch.searchsorted(row_R, some["row"]) * longest + some["position"])


def pruned(batch: Batch, keep_N: Tensor) -> tuple[Batch, Tensor]:
    """A micro-batch without the rows of which nothing is kept, and the weights of the labels that are left.

    Args:
        batch: the micro-batch.
        keep_N: the weights of its rows' own labels; those of virtual tokens stay as they are.
    """
    where = find_targets(batch)
    row_N, own_N = where.row_N.cpu(), batch.token_ids_BT[where.row_N, where.source_N + 1].cpu() >= 0
    kept_B = keep_N.new_zeros(len(batch.row_ids)).index_add(0, row_N[own_N], keep_N.abs()) > 0
    every_N = keep_N.new_ones(len(row_N)).masked_scatter(own_N, keep_N)
    if bool(kept_B.all()):
        return batch, every_N
    chosen = kept_B.nonzero()[:, 0].to(batch.token_ids_BT.device)
    return batch.take(chosen), every_N[kept_B[row_N]]


def _sorted(table: dict[str, Tensor]) -> Tensor:
    by_position = table["position"].argsort(stable=True)
    return by_position[table["row"][by_position].argsort(stable=True)]
