"""Rows that are made when they are asked for, one by one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import overload

from luthier.rows.encode import Encoded


class LazyRows(Sequence[Encoded]):
    """Encoded rows that are made when they are asked for: `row(place)` makes one."""

    @abstractmethod
    def row(self, place: int) -> Encoded:
        """The row at a place, from 0."""

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        places = range(len(self))[index]
        return tuple(map(self.row, places)) if isinstance(places, range) else self.row(places)

    def __iter__(self) -> Iterator[Encoded]:
        # The one of `Sequence` takes an IndexError within `row` for the end of the rows.
        return map(self.row, range(len(self)))
