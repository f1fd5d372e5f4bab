"""What a model says of rows, as a store keeps it: likelihoods of answers, and the largest probabilities at each target."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.columns import chunked, losses, targets
from luthier.errors import LuthierError
from luthier.generation.generate import BATCH_TOKENS
from luthier.kinds import TEACHER, Chunk, Column, Now, View
from luthier.models.modes import evaluating
from luthier.rows.batches import collate, plan_epoch
from luthier.rows.encode import Encoded, Sizes
from luthier.rows.numbers import LIKELIHOOD, Entry
from luthier.training.services import view_of
from luthier.tune import Tune

_LOWEST = torch.finfo(torch.float32).min
"""Stands for the logarithm of 0: times 0 it is 0, as minus infinity is not."""
_CODE = (chunked, losses, targets, sys.modules[__name__])


def code_fingerprint() -> str:
    """Identifies the code that makes numbers, so that no change to it can be forgotten."""
    return hashlib.sha256("".join(map(inspect.getsource, _CODE)).encode()).hexdigest()


def entries_of(
    tune: Tune,
    rows: Sequence[Encoded],
    kind: str,
    *,
    top_k: int = 0,
    vocabulary: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[Entry]:
    """What a model says of rows, in their order.

    Args:
        tune: the model, with what is attached to it.
        rows: encoded rows, each with labels.
        kind: `likelihood` or `teacher`.
        top_k: of `teacher`, how many probabilities each target gets.
        vocabulary: of `teacher`, how many tokens may have them, those with the first ids; none: all that the model knows.
        batch_tokens: the most tokens of one forward pass, padding counted; a longer row is one by itself.

    Raises:
        LuthierError: the model gives numbers that are not finite.
    """
    sizes = Sizes.of(rows)
    # All rows are one step of an epoch: sorted by length and cut so that little is padded.
    plan = plan_epoch(
        sizes.lengths,
        tokens=sizes.tokens,
        members=sizes.members,
        micro_batch_tokens=batch_tokens,
        batch_rows=max(1, len(rows)),
        seed=0,
        epoch=0,
    )
    columns = chunked.resolve(["nll"]) if kind == "likelihood" else _top_columns(top_k, vocabulary)
    device = next(tune.model.parameters()).device
    found: dict[int, Entry] = {}
    with evaluating(tune.model):
        for places in (places for step in plan for places in step):
            some = [rows[place] for place in places]
            view = view_of(tune, collate(some).to(device), columns, Now(), pack=False)
            values = _likelihoods(view) if kind == "likelihood" else _top(view)
            counts = view.targets_by_row().tolist()
            found.update(zip(places, _cut(some, counts, values, by_row=kind == "likelihood"), strict=True))
    for place, row in enumerate(rows):
        if not all(bool(numpy.isfinite(one).all()) for one in found[place].values.values()):
            raise LuthierError(
                "the model gives numbers that are not finite",
                where=row.place,
                fix="use another precision, or leave the row out",
            )
        yield found.pop(place)


def _likelihoods(view: View) -> dict[str, NDArray[Any]]:
    return {LIKELIHOOD: -view.sum_rows_wide(view["nll"]).cpu().numpy().astype(float)}


def _top(view: View) -> dict[str, NDArray[Any]]:
    log_NK, id_NK, rest_N = (view[name].cpu() for name in TEACHER)
    return dict(zip(TEACHER, (log_NK.float().numpy(), id_NK.int().numpy(), rest_N.float().numpy()), strict=True))


def _top_columns(top_k: int, vocabulary: int | None) -> tuple[Column, ...]:
    def ids(chunk: Chunk) -> Tensor:
        return chunk.once("likeliest tokens", lambda: chunk.log_probabilities[:, :vocabulary].topk(top_k, dim=-1).indices)

    def logs(chunk: Chunk) -> Tensor:
        return chunk.log_probabilities.gather(-1, ids(chunk)).clamp(min=_LOWEST)

    def rest(chunk: Chunk) -> Tensor:
        # Summed, not taken from 1: what is left is small.
        return chunk.log_probabilities.exp().scatter(-1, ids(chunk), 0.0).sum(-1)

    return tuple(Column(name, make, gradient=False) for name, make in zip(TEACHER, (logs, ids, rest), strict=True))


def _cut(rows: Sequence[Encoded], counts: Sequence[int], values: Mapping[str, NDArray[Any]], *, by_row: bool) -> Iterator[Entry]:
    """The entries of the rows of a batch, from what stands one behind the other for all of their mates, or of these for all labels."""
    ends = [0, *accumulate(1 + len(row.mates) for row in rows)]
    target_ends = [0, *accumulate(counts)]
    for row, (first, behind) in zip(rows, pairwise(ends), strict=True):
        part = slice(first, behind) if by_row else slice(target_ends[first], target_ends[behind])
        numbers = {name: one[part].reshape(-1) for name, one in values.items()}
        yield Entry(row.id, row.digest, tuple(counts[first:behind]), numbers)
