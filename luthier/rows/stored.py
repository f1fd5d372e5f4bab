"""Encoded rows in a memory-mapped file: training reads them by index, and only their sizes stay in memory.

A folder holds `rows.arrow`, an Arrow file, and `facts.json`: what the rows were made of, what became of the others, and the
checksum of the file. It is written beside its place and renamed, so a folder under its own name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from luthier import disk
from luthier.rows.encode import Encoded, EncodedRows, Sizes, renamed, two_tokens
from luthier.rows.groups import run_tokens
from luthier.rows.ids import digest, parted
from luthier.rows.lazy import LazyRows
from luthier.rows.shapes import BadRow

ROWS, FACTS = "rows.arrow", "facts.json"
TOKENS = {
    "id": pyarrow.string(),
    "token_ids": pyarrow.list_(pyarrow.int32()),
    "supervised": pyarrow.list_(pyarrow.bool_()),
    "where": pyarrow.string(),
    "columns": pyarrow.string(),
    "truncated": pyarrow.int32(),
    "text_shape": pyarrow.string(),
    "notes": pyarrow.list_(pyarrow.string()),
    "token_columns": pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.float32())),
}
SCHEMA = pyarrow.schema(
    {
        **TOKENS,
        "mates": pyarrow.list_(pyarrow.struct(TOKENS)),
        "tokens": pyarrow.int32(),
        "targets": pyarrow.int32(),
        "longest": pyarrow.int32(),
        "members": pyarrow.int32(),
        "run": pyarrow.int32(),
        "digest": pyarrow.int64(),
        "content": pyarrow.int64(),
        "occurrence": pyarrow.int32(),
        "encoded": pyarrow.int64(),
    }
)


class Chunk(NamedTuple):
    """Some rows in the order they were read, encoded, and what became of the others."""

    batch: pyarrow.RecordBatch
    truncated: int
    skipped: list[BadRow]
    """Records that are no rows."""
    bad: list[BadRow]
    """Rows that cannot be encoded."""
    dropped: list[BadRow]
    """Rows without anything to learn."""
    notes: Mapping[str, int]
    first_noted: Mapping[str, str]


@dataclass(frozen=True)
class Stored:
    """One source's rows on disk."""

    batches: list[pyarrow.RecordBatch]
    truncated: int
    skipped: tuple[BadRow, ...]
    dropped: tuple[BadRow, ...]
    notes: Mapping[str, int]
    first_noted: Mapping[str, str]

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self.batches)


class StoredRows(LazyRows):
    """Encoded rows that are read from a memory map when they are asked for.

    Args:
        batches: the rows, in order.
        renamed: ids by place, of rows that have others than those stored.
    """

    def __init__(self, batches: Iterable[pyarrow.RecordBatch], renamed: Mapping[int, str] | None = None) -> None:
        self.batches = [batch for batch in batches if batch.num_rows]
        self.renamed = renamed or {}
        self._ends = list(accumulate(batch.num_rows for batch in self.batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, place: int) -> Encoded:
        """The row at a place."""
        number = bisect_right(self._ends, place)
        batch = self.batches[number]
        row = batch.slice(place - (self._ends[number] - batch.num_rows), 1).to_pylist()[0]
        found = replace(_encoded(row), mates=tuple(map(_encoded, row["mates"])))
        return renamed(found, self.renamed[place]) if place in self.renamed else found

    def id_of(self, place: int) -> str:
        """A row's id, without reading the row."""
        number = bisect_right(self._ends, place)
        batch = self.batches[number]
        return self.renamed.get(place) or str(batch["id"][place - (self._ends[number] - batch.num_rows)])

    def bare(self) -> Iterator[Encoded]:
        """The rows one after the other as `two_tokens` makes them, which reads none of their tokens."""
        place = 0
        for batch in self.batches:
            names = ("id", "where", "columns", "text_shape", "targets", "members")
            for row in batch.select(names).to_pylist():
                id, columns = self.renamed.get(place, row["id"]), json.loads(row["columns"])
                yield two_tokens(id, row["where"], columns, row["text_shape"], row["targets"], mates=row["members"] - 1)
                place += 1

    def sizes(self) -> Sizes:
        """Their sizes, 8 bytes a row, and as much again where rows have mates."""
        sizes = Sizes(*(self._numbers(name) for name in Sizes._fields))
        return sizes if any(count > 1 for count in sizes.members) else Sizes(sizes.tokens, sizes.targets)

    def _numbers(self, column: str) -> array[int]:
        numbers = array("i")
        for batch in self.batches:
            numbers.frombytes(batch[column].to_numpy().tobytes())
        return numbers


def _plain(row: Encoded) -> dict[str, Any]:
    """What `TOKENS` says of one row."""
    columns = {"columns": json.dumps(row.columns), "token_columns": list(row.token_columns.items())}
    return {name: getattr(row, name) for name in TOKENS} | columns


def _encoded(row: Mapping[str, Any]) -> Encoded:
    """A row that `_plain` wrote, without mates."""
    token_columns = {name: tuple(numbers) for name, numbers in row["token_columns"]}
    several: dict[str, Any] = {name: tuple(row[name]) for name in ("token_ids", "supervised", "notes")}
    one: dict[str, Any] = {name: row[name] for name in ("id", "where", "truncated", "text_shape")}
    return Encoded(**one, **several, columns=json.loads(row["columns"]), token_columns=token_columns)


def batch_of(rows: EncodedRows, derived: Set[str] = frozenset()) -> pyarrow.RecordBatch:
    """Encoded rows as Arrow keeps them; `derived` are the ids that were derived from a row's content."""
    parts = [parted(row.id) if row.id in derived else (row.id, 0) for row in rows.rows]
    plain = [
        {
            **_plain(row),
            "mates": list(map(_plain, row.mates)),
            "tokens": tokens,
            "targets": targets,
            "longest": max(map(len, row.group)),
            "members": len(row.group),
            "run": run_tokens(row.group),
            "digest": digest(row.id),
            "content": digest(content),
            "occurrence": occurrence,
            "encoded": row.digest,
        }
        for row, tokens, targets, (content, occurrence) in zip(rows.rows, rows.sizes.tokens, rows.sizes.targets, parts, strict=True)
    ]
    return pyarrow.RecordBatch.from_pylist(plain, schema=SCHEMA)


def write(folder: Path, chunks: Iterable[Chunk], inputs: Mapping[str, Any]) -> None:
    """Write a folder of rows, in place of any that is there.

    Args:
        folder: where.
        chunks: the rows.
        inputs: what they were made of.

    Raises:
        OSError: there is no room, or the folder cannot be written.
    """
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        facts = _written(beside / ROWS, chunks)
        (beside / FACTS).write_text(json.dumps({"inputs": dict(inputs), **facts}, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _written(file: Path, chunks: Iterable[Chunk]) -> dict[str, Any]:
    truncated = rows = 0
    skipped: list[BadRow] = []
    bad: list[BadRow] = []
    dropped: list[BadRow] = []
    notes: Counter[str] = Counter()
    first: dict[str, str] = {}
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, SCHEMA) as writer:
        for chunk in chunks:
            writer.write_batch(chunk.batch)
            rows += chunk.batch.num_rows
            truncated += chunk.truncated
            skipped += chunk.skipped
            bad += chunk.bad
            dropped += chunk.dropped
            notes.update(chunk.notes)
            first = {**chunk.first_noted, **first}
    return {
        "rows": rows,
        "truncated": truncated,
        "skipped": skipped,
        "dropped": [*bad, *dropped],
        "notes": notes,
        "first_noted": first,
        "sha256": disk.sha256(file),
    }


def read(folder: Path) -> Stored:
    """Open a folder of rows.

    Raises:
        ValueError: it is damaged; the message says what.
        OSError: it cannot be read.
    """
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    # The whole file is read once: a damaged length would otherwise be found, or not, in the middle of a run.
    if disk.sha256(folder / ROWS) != facts["sha256"]:
        raise ValueError("the checksum differs")
    with pyarrow.memory_map(str(folder / ROWS)) as source:
        reader = pyarrow.ipc.open_file(source)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    return Stored(
        batches,
        facts["truncated"],
        tuple(BadRow(*one) for one in facts["skipped"]),
        tuple(BadRow(*one) for one in facts["dropped"]),
        facts["notes"],
        facts["first_noted"],
    )
