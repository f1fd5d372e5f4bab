"""Putting encoded rows into batches, and planning which rows make up which step.

A plan is a pure function of the lengths, the seed and the epoch: a resumed run needs only the epoch and the step to go
on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from luthier.draws import generator
from luthier.errors import LuthierError
from luthier.kinds import Batch
from luthier.rows.encode import Encoded

Plan = list[list[list[int]]]
"""Steps of micro-batches of indices of rows."""

NOT_A_TARGET = -100
# Filling micro-batches to the brim pads a third of small steps, cutting at every length makes too many of them. On
# lengths like those of conversations this share comes close to the best cut that counts both.
_MOST_PADDING = 1 / 16


def collate(encoded: Sequence[Encoded], *, pad_to_multiple: int = 1, side: Literal["right", "left"] = "right") -> Batch:
    """Pad rows to one length and stack them, each with its mates behind it.

    Args:
        encoded: B rows, mates counted; none at all gives a batch of shape [0, 0], which adds nothing to any sum.
        pad_to_multiple: the length T is rounded up to a multiple of this.
        side: where padding stands: `"right"` to train, `"left"` to generate.

    Returns:
        The batch. Labels are not shifted. Numeric columns become fp32 of shape [B], NaN where a row lacks the column; those of tokens
        fp32 of shape [B, T], or [B, T, K] in the type they have, 0 there and where padded.
    """
    groups = _groups(encoded)
    encoded = [one for row in encoded for one in row.group]
    time = _rounded_up(max(map(len, encoded), default=0), pad_to_multiple)
    token_ids_BT = torch.zeros(len(encoded), time, dtype=torch.long)
    attend_BT = torch.zeros(len(encoded), time, dtype=torch.bool)
    position_BT = torch.zeros(len(encoded), time, dtype=torch.long)
    label_BT = torch.full((len(encoded), time), NOT_A_TARGET, dtype=torch.long)
    token_columns = _token_columns(encoded, time)
    for index, row in enumerate(encoded):
        place = slice(0, len(row)) if side == "right" else slice(time - len(row), time)
        token_ids_T = torch.tensor(row.token_ids, dtype=torch.long)
        token_ids_BT[index, place] = token_ids_T
        attend_BT[index, place] = True
        position_BT[index, place] = torch.arange(len(row))
        label_BT[index, place] = token_ids_T.masked_fill(~torch.tensor(row.supervised, dtype=torch.bool), NOT_A_TARGET)
        for name, numbers in row.token_columns.items():
            token_columns[name][index, place] = torch.as_tensor(numbers)
    row_ids = tuple(row.id for row in encoded)
    columns, texts = _columns(encoded), _texts(encoded)
    return Batch(token_ids_BT, attend_BT, position_BT, label_BT, row_ids, columns, texts, token_columns, groups)


def _token_columns(encoded: Sequence[Encoded], time: int) -> dict[str, Tensor]:
    """Room for the numbers of tokens, by name."""
    first = {name: numbers for row in reversed(encoded) for name, numbers in row.token_columns.items()}
    examples = {name: torch.as_tensor(first[name]) for name in sorted(first)}
    return {name: one.new_zeros(len(encoded), time, *one.shape[1:]) for name, one in examples.items()}


def _groups(encoded: Sequence[Encoded]) -> tuple[tuple[int, ...], ...]:
    """Places of each row and its mates; nothing where no row has any."""
    ends = list(accumulate(1 + len(row.mates) for row in encoded))
    whole = tuple(tuple(range(end - 1 - len(row.mates), end)) for row, end in zip(encoded, ends, strict=True))
    return whole if any(row.mates for row in encoded) else ()


def plan_epoch(
    lengths: Sequence[int],
    *,
    tokens: Sequence[int] | None = None,
    members: Sequence[int] = (),
    run: Sequence[int] = (),
    micro_batch_tokens: int,
    batch_tokens: int | None = None,
    batch_rows: int | None = None,
    seed: int,
    epoch: int,
    world_size: int = 1,
    rank: int = 0,
    pad_to_multiple: int = 1,
    drop_last: bool = False,
    packed: bool = False,
) -> Plan:
    """Which rows make up which step and micro-batch of one epoch, for one process.

    Rows are shuffled, then filled into steps in that order, so which rows share a step does not depend on their length.
    Within a step they are dealt to the processes so that each has about as many tokens, and each process sorts its own
    by length and cuts them into micro-batches: of as many rows as fit where they run without padding, else ending one
    before its padding exceeds a sixteenth of `micro_batch_tokens`. Every row comes once an epoch.

    Args:
        lengths: tokens of each row; of one with mates, those of the longest among them.
        tokens: all tokens of each row and its mates; none: no row has mates.
        members: how many rows stand in a micro-batch for each; none: one.
        run: tokens that each runs where it is packed; none: all of them.
        micro_batch_tokens: the most tokens, padding counted, that one micro-batch runs; a longer row is one by itself.
        batch_tokens: the most tokens, padding not counted, of one step over all processes; a longer row is one by
            itself.
        batch_rows: instead of `batch_tokens`, the rows of one step over all processes.
        seed: the run's seed.
        epoch: the number of the epoch, from 0; another epoch has another order.
        world_size: processes.
        rank: this process.
        pad_to_multiple: what `collate` will be given.
        drop_last: leave out the last step if it is not full.
        packed: micro-batches will run without padding.

    Returns:
        The plan. All processes have equally many steps; a step is an empty list where a process has no row in it.

    Raises:
        LuthierError: not exactly one of `batch_tokens` and `batch_rows` is given, or a number is out of range.
    """
    _check_sizes(micro_batch_tokens, batch_tokens, batch_rows, world_size, rank)
    order = torch.randperm(len(lengths), generator=generator("epoch order", seed, epoch)).tolist()
    tokens, members = tokens or lengths, members or [1] * len(lengths)
    budget, costs = (batch_tokens, tokens) if batch_tokens is not None else (batch_rows, [1] * len(lengths))
    assert budget is not None
    steps: list[list[int]] = []
    filled = budget
    for index in order:
        if not steps or filled + costs[index] > budget:
            steps.append([])
            filled = 0
        steps[-1].append(index)
        filled += costs[index]
    if drop_last and steps and filled < budget:
        steps.pop()
    if packed:
        run = run or tokens
        return [_without_padding(_dealt(step, run, run, world_size)[rank], run, micro_batch_tokens) for step in steps]
    padded = [_rounded_up(length, pad_to_multiple) for length in lengths]
    room = [count * length for count, length in zip(members, padded, strict=True)]
    return [_micro_batches(_dealt(step, padded, room, world_size)[rank], padded, members, micro_batch_tokens) for step in steps]


def padding_share(
    plan: Plan,
    lengths: Sequence[int],
    *,
    tokens: Sequence[int] | None = None,
    members: Sequence[int] = (),
    pad_to_multiple: int = 1,
) -> float:
    """The share of a plan's tokens that are padding, from 0 to 1. The arguments are those of `plan_epoch`."""
    tokens, members = tokens or lengths, members or [1] * len(lengths)
    micro_batches = [rows for step in plan for rows in step]
    real = sum(tokens[index] for rows in micro_batches for index in rows)
    longest = [_rounded_up(max(lengths[index] for index in rows), pad_to_multiple) for rows in micro_batches]
    padded = sum(sum(members[index] for index in rows) * length for rows, length in zip(micro_batches, longest, strict=True))
    return 1 - real / padded if padded else 0.0


def _check_sizes(micro_batch_tokens: int, batch_tokens: int | None, batch_rows: int | None, world_size: int, rank: int) -> None:
    if (batch_tokens is None) == (batch_rows is None):
        raise LuthierError("a step's size must be given once", fix="give either batch_tokens or batch_rows")
    sizes = {"micro_batch_tokens": micro_batch_tokens, "batch_tokens": batch_tokens, "batch_rows": batch_rows}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise LuthierError(f"{name} is {size}", fix="give at least 1")
    if not 0 <= rank < world_size:
        raise LuthierError(f"rank {rank} is not one of {world_size} processes")


def _dealt(rows: Sequence[int], lengths: Sequence[int], room: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal rows, the longest first, each to the process that has the fewest tokens so far."""
    hands: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for index in sorted(rows, key=lambda index: (-lengths[index], index)):
        least = tokens.index(min(tokens))
        hands[least].append(index)
        tokens[least] += room[index]
    return hands


def _micro_batches(rows: Sequence[int], lengths: Sequence[int], members: Sequence[int], limit: int) -> list[list[int]]:
    """Cut rows that are sorted by length, the longest first, so that too little memory shows at once."""
    cut: list[list[int]] = []
    padding = filled = 0
    for index in rows:
        longest, count = lengths[cut[-1][0]] if cut else 0, members[index]
        padding += count * (longest - lengths[index])
        if cut and (filled + count) * longest <= limit and padding <= limit * _MOST_PADDING:
            cut[-1].append(index)
            filled += count
        else:
            cut.append([index])
            padding, filled = 0, count
    return cut


def _without_padding(rows: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Cut rows into micro-batches of at most so many real tokens."""
    cut: list[list[int]] = []
    filled = limit
    for index in rows:
        if filled + lengths[index] > limit:
            cut.append([])
            filled = 0
        cut[-1].append(index)
        filled += lengths[index]
    return cut


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _columns(encoded: Sequence[Encoded]) -> Mapping[str, Tensor]:
    names = {name for row in encoded for name, value in row.columns.items() if not isinstance(value, str)}
    return {name: torch.tensor([_number(row.columns.get(name)) for row in encoded], dtype=torch.float64) for name in sorted(names)}


def _texts(encoded: Sequence[Encoded]) -> Mapping[str, tuple[str, ...]]:
    names = {name for row in encoded for name, value in row.columns.items() if isinstance(value, str)}
    return {name: tuple(_text(row.columns.get(name)) for row in encoded) for name in sorted(names)}


def _text(value: float | int | str | None) -> str:
    return value if isinstance(value, str) else ""


def _number(value: float | int | str | None) -> float:
    if not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    # More digits than a float has room for: who reads the column is told that it is not finite.
    except OverflowError:
        return math.inf if value > 0 else -math.inf
