"""The sources of training rows: read whole, or again and again where they are larger than memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from luthier.errors import LuthierError
from luthier.recipe import RowsRecipe
from luthier.rows.blocks import BLOCK, KEY, Splitter
from luthier.rows.columns import Columns
from luthier.rows.encode import EncodedRows
from luthier.rows.files import LeftOut, find
from luthier.rows.held_out import Split
from luthier.rows.ids import numbered, parted, same_id
from luthier.rows.read import Rows, name_of, read, stream
from luthier.rows.shapes import BadRow, Row


@dataclass(frozen=True)
class Streamed(Iterable[Row]):
    """A source that is read anew each time it is gone through.

    Args:
        name: what reports call it.
        source: a path, a pattern or `hub:NAME`.
        shape, columns: as for `luthier.rows.read.read`.
        without: rows that are held out.
        splitter: what cuts documents into blocks.
    """

    name: str
    source: str | Path
    shape: str | None = None
    columns: Columns | None = None
    without: Split | None = None
    splitter: Splitter | None = None

    def records(self) -> Iterator[Row | BadRow]:
        """The rows, and the records that are none."""
        found = stream(self.source, shape=self.shape, columns=self.columns)
        found = found if self.splitter is None else self.splitter.rows(found)
        return (one for one in found if self.without is None or isinstance(one, BadRow) or not self.without.takes(one))

    def __iter__(self) -> Iterator[Row]:
        return (one for one in self.records() if isinstance(one, Row))


@dataclass(frozen=True)
class Joined(Iterable[Row]):
    """The rows of several sources, one after the other."""

    sources: Sequence[Iterable[Row]]

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self.sources)


Sources = Sequence[Rows] | Sequence[Streamed]


def read_rows(recipe: RowsRecipe) -> Sources:
    """The sources a recipe names: read into memory, or to be streamed.

    Raises:
        LuthierError: a source is not there or is given in Python and cannot be streamed, a row cannot be read, or two rows of
            different sources share an id.
    """
    return _streamed(recipe) if recipe.streaming else _read(recipe)


def _read(recipe: RowsRecipe) -> list[Rows]:
    return apart(read(one.rows, shape=recipe.format, on_bad_row=recipe.on_bad_row, columns=one.columns) for one in recipe.sources())


def apart(sources: Iterable[Rows]) -> list[Rows]:
    """The sources with ids that no two rows share: derived ones count a content's occurrences through all sources, as within one.

    Raises:
        LuthierError: two rows have the same id of their own.
    """
    seen: dict[str, str] = {}
    before: Counter[str] = Counter()
    found = []
    for source in sources:
        here: Counter[str] = Counter()
        rows = []
        for row in source:
            if row.derived:
                content, occurrence = parted(row.id)
                here[content] = max(here[content], occurrence)
                if content in before:
                    row = replace(row, id=numbered(content, before[content] + occurrence))
            if row.id in seen:
                raise same_id(row.id, seen[row.id], row.where)
            seen[row.id] = row.where
            rows.append(row)
        before += here
        found.append(replace(source, rows=tuple(rows)))
    return found


def _streamed(recipe: RowsRecipe) -> list[Streamed]:
    sources = []
    for one in recipe.sources():
        if not isinstance(one.rows, str | Path):
            raise LuthierError(
                "rows given in Python are in memory already", where="rows.streaming", fix="give files, or leave streaming off"
            )
        sources.append(Streamed(name_of(one.rows), one.rows, recipe.format, one.columns))
    return sources


def in_blocks(sources: Sources, splitter: Splitter) -> tuple[Sources, list[str]]:
    """Sources whose documents are cut into blocks, and what to say of it.

    Raises:
        LuthierError: the rows are in memory, and none is a document.
    """
    if any(isinstance(one, Streamed) for one in sources):
        return [replace(one, splitter=splitter) for one in sources if isinstance(one, Streamed)], [splitter.told()]
    cut = [replace(one, rows=tuple(splitter.rows(one))) for one in sources if isinstance(one, Rows)]
    if not any(BLOCK in row.fields for one in cut for row in one):
        shapes = dict.fromkeys(row.shape for one in cut for row in one)
        raise LuthierError(
            f"no row is a document that could be split: they are {', '.join(f'`{shape}`' for shape in shapes)}",
            where=KEY,
            fix="leave it out, or give rows of `text`",
        )
    return cut, [splitter.told(row for one in cut for row in one)]


def files_of(sources: Sources) -> tuple[list[str], list[LeftOut]]:
    """The files that sources are read from, and those beside them that are left out; nothing of sources that are no files."""
    files: list[str] = []
    left_out: list[LeftOut] = []
    for one in sources:
        if isinstance(one, Rows):
            files += one.files
            left_out += one.left_out
        elif not str(one.source).startswith("hub:"):
            found = find(one.source)
            files += map(str, found.files)
            left_out += found.left_out
    return files, left_out


def places_of(sources: Sequence[Rows], rows: EncodedRows) -> tuple[list[int], ...]:
    """Where each source's rows stand among the encoded ones.

    Raises:
        LuthierError: a row is of no source, because a row map made it.
    """
    source_of = {row.id: number for number, source in enumerate(sources) for row in source}
    places: tuple[list[int], ...] = tuple([] for _ in sources)
    for place, row in enumerate(rows.rows):
        if row.id not in source_of:
            raise LuthierError(
                f"the row `{row.id}` was made by a row map, so no source's weight is its own",
                where="rows.map",
                fix="leave out weights and temperature, or the row map",
            )
        places[source_of[row.id]].append(place)
    return places


def distinct(names: Sequence[str]) -> list[str]:
    """Names with a number where one came before: `train`, `train (2)`."""
    return [name if name not in names[:place] else f"{name} ({names[:place].count(name) + 1})" for place, name in enumerate(names)]
