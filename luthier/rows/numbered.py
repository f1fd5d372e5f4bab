"""Rows with the numbers that a store holds of them: scalars as free columns, what each label has as numbers of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy
from numpy.typing import NDArray

from luthier.errors import LuthierError
from luthier.rows.encode import Encoded, EncodedRows, two_tokens
from luthier.rows.groups import PAIR
from luthier.rows.ids import parted
from luthier.rows.lazy import LazyRows
from luthier.rows.numbers import LIKELIHOOD, Numbers
from luthier.rows.stored import StoredRows

PAIRED = ("reference_chosen", "reference_rejected")
_NUMBERED = re.compile(r"[0-9a-f]{12}(#\d+)?-\d+")
"""A derived id with the number that tells it from others of the same content."""
_NAMED = 5
"""Rows that an error names one by one."""


@dataclass(frozen=True)
class Joined:
    """Stores of one kind, and where they hold each row.

    Args:
        stores: the stores.
        store_R: which of them holds a row, by the row's place.
        place_R: where it holds it.
    """

    stores: Sequence[Numbers]
    store_R: NDArray[Any]
    place_R: NDArray[Any]

    def of(self, row: int) -> tuple[Numbers, int]:
        """The store that holds a row, and where."""
        return self.stores[int(self.store_R[row])], int(self.place_R[row])


class NumberedRows(LazyRows):
    """Encoded rows with numbers that are read when they are asked for.

    Args:
        rows: the rows without them.
        joined: the numbers.
    """

    def __init__(self, rows: Sequence[Encoded], joined: Sequence[Joined]) -> None:
        self.rows, self.joined = rows, joined

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, place: int) -> Encoded:
        """The row at a place."""
        row = self.rows[place]
        for one in self.joined:
            store, entry = one.of(place)
            row = _with_likelihoods(row, store, entry) if store.kind == "likelihood" else _with_arrays(row, store, entry)
        return row

    def bare(self) -> Iterator[Encoded]:
        """The rows one after the other as `two_tokens` makes them, with their scalars."""
        for place, row in enumerate(bare(self.rows)):
            for one in self.joined:
                store, entry = one.of(place)
                row = _with_likelihoods(row, store, entry) if store.kind == "likelihood" else row
            yield row


def without_numbers(rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """The rows as they are before stores are joined to them."""
    return rows.rows if isinstance(rows, NumberedRows) else rows


def bare(rows: Sequence[Encoded]) -> Iterator[Encoded]:
    """Rows one after the other as `two_tokens` makes them, which reads no more of them than that."""
    if isinstance(rows, StoredRows | NumberedRows):
        return rows.bare()
    return (two_tokens(one.id, one.where, one.columns, one.text_shape, sum(one.supervised), mates=len(one.mates)) for one in rows)


def _with_likelihoods(row: Encoded, store: Numbers, entry: int) -> Encoded:
    found = store.likelihoods(entry).tolist()

    def more(one: Encoded, number: int) -> Encoded:
        if row.text_shape == PAIR:
            new = dict(zip(PAIRED, found, strict=True))
        else:
            # An answer that stands by itself is read under the name that the first of two has.
            alone = {} if row.mates else {PAIRED[0]: found[number]}
            new = {LIKELIHOOD: found[number], **alone}
        return replace(one, columns={**one.columns, **new})

    return _each(row, more)


def _with_arrays(row: Encoded, store: Numbers, entry: int) -> Encoded:
    arrays = store.arrays(entry)
    masks = [numpy.asarray(one.supervised, dtype=numpy.bool_) for one in (row, *row.mates)]
    ends = [0, *accumulate(int(one.sum()) for one in masks)]

    def more(one: Encoded, number: int) -> Encoded:
        part = slice(ends[number], ends[number + 1])
        new = {name: _at(masks[number], values[part]) for name, values in arrays.items()}
        return replace(one, token_columns={**one.token_columns, **new})

    return _each(row, more)


def _at(is_target_T: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """What labels have, [labels, ...], at their places among all tokens, [T, ...]."""
    found = numpy.zeros((len(is_target_T), *values.shape[1:]), dtype=values.dtype)
    found[is_target_T] = values
    return found


def _each(row: Encoded, change: Callable[[Encoded, int], Encoded]) -> Encoded:
    """A row and its mates, each changed; `change` gets the number of each."""
    return replace(change(row, 0), mates=tuple(change(one, number) for number, one in enumerate(row.mates, start=1)))


def join(rows: EncodedRows, stores: Sequence[Numbers], fix: Callable[[Sequence[Encoded]], str]) -> EncodedRows:
    """Rows with the numbers that stores of one kind hold of them.

    A row whose id says that others have the same content may have the numbers of any of these.

    Args:
        rows: encoded rows.
        stores: the stores; of those that hold a row as it is, the first counts.
        fix: says what helps where rows have no numbers.

    Raises:
        LuthierError: rows have no numbers, or have changed since these were made; it names them.
    """
    before = without_numbers(rows.rows)
    ids, encoded_R = _ids(before), _digests(before)
    store_R, place_R = numpy.full(len(ids), -1, dtype=numpy.int16), numpy.full(len(ids), -1, dtype=numpy.int64)
    known_R = numpy.zeros(len(ids), dtype=bool)
    for number, store in enumerate(stores):
        for names in (ids, [parted(one)[0] if _NUMBERED.fullmatch(one) else one for one in ids]):
            found_R = store.find(names)
            known_R |= found_R >= 0
            same_R = (found_R >= 0) & (store.encoded_R[found_R] == encoded_R) & (store_R < 0)
            store_R[same_R], place_R[same_R] = number, found_R[same_R]
    for lacking, what in (
        (~known_R, "have no numbers in the store"),
        (
            store_R < 0,
            "are not as they were when their numbers were made: their text has changed, or what the recipe does with it (rows.map, "
            "loss_on, max_length, too_long)",
        ),
    ):
        if lacking.any():
            raise _refusal(rows, numpy.flatnonzero(lacking), what, stores[0], fix)
    joined = Joined(stores, store_R, place_R)
    others = rows.rows.joined if isinstance(rows.rows, NumberedRows) else ()
    return replace(rows, rows=NumberedRows(before, (*others, joined)))


def _refusal(
    rows: EncodedRows, places: NDArray[Any], what: str, store: Numbers, fix: Callable[[Sequence[Encoded]], str]
) -> LuthierError:
    first = [rows.rows[int(place)] for place in places[:_NAMED]]
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return LuthierError(
        f"{len(places)} of {len(rows.rows)} rows {what}",
        where=", ".join(one.place for one in first) + more + f"; store: {store.folder}",
        fix=fix(first),
    )


def _ids(rows: Sequence[Encoded]) -> list[str]:
    if isinstance(rows, StoredRows):
        return [rows.id_of(place) for place in range(len(rows))]
    return [row.id for row in rows]


def _digests(rows: Sequence[Encoded]) -> NDArray[Any]:
    if isinstance(rows, StoredRows):
        return numpy.concatenate([batch["encoded"].to_numpy() for batch in rows.batches])
    return numpy.array([row.digest for row in rows], dtype=numpy.int64)
