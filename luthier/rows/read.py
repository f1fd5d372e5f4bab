"""Reading rows: from files, folders, the hub, a data set or plain Python, with every unusable record named.

Rows are checked while they are read, so a broken record stops a run before it trains, not in the middle of the night.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, overload
from uuid import UUID

import pyarrow
import pyarrow.parquet

from luthier.errors import LuthierError
from luthier.rows.shapes import BadRow, Row, bad_rows_error, row_of, text_keys

OnBadRow = Literal["stop", "skip"]
Read = tuple[str, Mapping[str, Any] | BadRow]
"""A place, and what stands there: a record, or why there is none."""

_LONGEST_CSV_VALUE = 2**31 - 1
# `007` is a name, not the number 7: a number must begin as it would be written back.
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows in the order they were read.

    Args:
        name: what reports call this set.
        rows: the usable rows.
        skipped: the records left out because `on_bad_row` is `"skip"`.
        ignored_files: files of a folder whose format is none of those that can be read.
    """

    name: str
    rows: tuple[Row, ...]
    skipped: tuple[BadRow, ...] = ()
    ignored_files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    @property
    def shape_counts(self) -> dict[str, int]:
        """How many rows have each shape, the most frequent first."""
        return dict(Counter(row.shape for row in self.rows).most_common())

    def fingerprint(self) -> str:
        """SHA-256 over the ids and contents in their order, as 64 hexadecimal digits; names and places do not count."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(_canonical([row.id, row.shape, row.fields, row.columns]).encode() + b"\n")
        return digest.hexdigest()


def read(
    source: str | Path | Rows | Iterable[Mapping[str, Any]],
    *,
    shape: str | None = None,
    on_bad_row: OnBadRow = "stop",
    name: str | None = None,
) -> Rows:
    """Read and check rows.

    Args:
        source: a path to `.jsonl`, `.ndjson`, `.json` (a list, or an object with the list under `data`), `.csv`,
            `.tsv`, `.parquet` or `.txt` (one document), each also gzipped (`.jsonl.gz`) except Parquet; a folder or a
            pattern such as `data/*.jsonl`, read in the order of the names; `hub:NAME`, `hub:NAME:SPLIT` or
            `hub:OWNER/NAME/CONFIG:SPLIT` (split `train` when not given); a `datasets.Dataset`; or any Python iterable
            of mappings. Rows are returned as they are.
        shape: which shape to use where a record's keys fit several.
        on_bad_row: `"stop"` raises one error that names up to five bad records; `"skip"` leaves them out and lists all
            of them in `Rows.skipped`.
        name: what reports call the rows; the file, folder or data set's name when not given.

    Raises:
        LuthierError: the source cannot be opened, a record is unusable, or nothing usable is left.
    """
    if on_bad_row not in ("stop", "skip"):
        raise LuthierError(f"on_bad_row is {on_bad_row!r}", mend='write "stop" or "skip"')
    if isinstance(source, Rows):
        return source
    records, found_name, ignored = _opened(source)
    name = name or found_name
    ids = _Ids()
    rows: list[Row] = []
    bad: list[BadRow] = []
    for where, record in records:
        if isinstance(record, BadRow):
            bad.append(record)
            continue
        try:
            rows.append(row_of(record, id=ids.of(record, where), where=where, shape=shape))
        except LuthierError as problem:
            bad.append(BadRow(where, problem.what, problem.mend))
    if bad and (on_bad_row == "stop" or not rows):
        raise bad_rows_error(bad, len(rows) + len(bad))
    if not rows:
        raise LuthierError("there are no rows", where=name, mend="check that this is the right file")
    return Rows(name, tuple(rows), tuple(bad), ignored)


class _Ids:
    """Hands out ids that depend on a record's content, so that shuffling or extending a file renames nothing."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def of(self, record: Mapping[str, Any], where: str) -> str:
        content = _canonical({key: value for key, value in record.items() if key != "id"})
        try:
            encoded = content.encode()
        except UnicodeEncodeError as problem:
            broken = content[max(0, problem.start - 20) : problem.start]
            raise LuthierError(f"the text after {broken!r} is not valid UTF-8", mend="save the file as UTF-8") from None
        own = record.get("id")
        if own is None:
            return self._derived(hashlib.sha1(encoded, usedforsecurity=False).hexdigest()[:12], where)
        if isinstance(own, bool) or not isinstance(own, str | int) or own == "":
            raise LuthierError(f"`id` must be text or a whole number, not {own!r}")
        if str(own) in self._seen:
            raise LuthierError(
                f"the id `{own}` is already that of {self._seen[str(own)]}",
                mend="give every row its own id, or remove the key `id` to have ids derived from the content",
            )
        self._seen[str(own)] = where
        return str(own)

    def _derived(self, content: str, where: str) -> str:
        derived, occurrence = content, 1
        while derived in self._seen:
            occurrence += 1
            derived = f"{content}-{occurrence}"
        self._seen[derived] = where
        return derived


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, date | time | timedelta | Decimal | bytes | UUID):
        return str(value)
    raise LuthierError(f"a row cannot hold a value of the type {type(value).__name__}", mend="make it text or a number")


def _opened(source: str | Path | Iterable[Mapping[str, Any]]) -> tuple[Iterator[Read], str, tuple[str, ...]]:
    if isinstance(source, str) and source.startswith("hub:"):
        return _enumerated(_from_hub(source), source), source.removeprefix("hub:"), ()
    if isinstance(source, str | Path):
        return _from_path(source)
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, source))
        raise LuthierError(f"rows cannot be read from a {type(source).__name__}", mend=f"give one of its values: {keys}")
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise LuthierError(f"rows cannot be read from a {type(source).__name__}", mend="give a path or a list of mappings")
    return _enumerated(source, "row"), type(source).__name__, ()


def _from_hub(source: str) -> Any:
    import datasets  # Takes a second to import, which reading a local file need not wait for.

    name, _, split = source.removeprefix("hub:").partition(":")
    owner_and_name, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    try:
        return datasets.load_dataset(owner_and_name, config or None, split=split or "train")
    # The hub's library raises dozens of kinds of errors; whichever it is, the user needs to read it, with the place.
    except Exception as problem:
        raise LuthierError(
            f"the data set `{name}` could not be loaded: {type(problem).__name__}: {problem}",
            where=source,
            mend="check the name, the split and the connection, or download it and give the path",
        ) from problem


def _from_path(source: str | Path) -> tuple[Iterator[Read], str, tuple[str, ...]]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        usable = [file for file in files if _format_of(file) is not None]
        if not usable:
            raise LuthierError("the folder holds no file that can be read", where=str(path), mend=_formats_known())
        ignored = tuple(str(file) for file in files if _format_of(file) is None)
        return _from_files(usable), path.name, ignored
    if not path.exists() and glob.has_magic(str(path)):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        if not files:
            raise LuthierError("no file fits this pattern", where=str(source), mend="check the pattern")
        return _from_files(files), str(source), ()
    if not path.exists():
        raise LuthierError(
            "there is no such file or folder",
            where=str(source),
            mend=f"check the path; a data set of the Hugging Face hub is written `hub:{source}`",
        )
    return _from_files([path]), Path(path.name.removesuffix(".gz")).stem, ()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _from_files(files: Sequence[Path]) -> Iterator[Read]:
    for file in files:
        reader = _format_of(file)
        if reader is None:
            raise LuthierError(f"`{file.suffix}` files cannot be read", where=str(file), mend=_formats_known())
        try:
            yield from reader(file)
        except (OSError, EOFError, zlib.error, csv.Error, pyarrow.ArrowException) as problem:
            raise LuthierError(
                f"the file cannot be read: {problem}",
                where=str(file),
                mend="check that the file is whole and not damaged",
            ) from problem


def _format_of(path: Path) -> Callable[[Path], Iterator[Read]] | None:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet
    return _FORMATS.get(Path(name.removesuffix(".gz")).suffix)


def _formats_known() -> str:
    return f"formats that can be read: {', '.join(_FORMATS)} (each also with .gz), .parquet"


def _bytes(path: Path) -> bytes:
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as file:
            return file.read()
    return path.read_bytes()


def _decoded(raw: bytes) -> str:
    # Broken bytes become lone surrogates, which the check of every record's content finds and names by its line:
    # a strict decode would lose the whole file, and a lenient one the evidence.
    return raw.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _json_lines(path: Path) -> Iterator[Read]:
    for number, raw in enumerate(_bytes(path).split(b"\n"), start=1):
        line, where = _decoded(raw).strip(), f"{path}:{number}"
        if not line:
            continue
        try:
            yield where, _object(json.loads(line), where)
        except json.JSONDecodeError as problem:
            yield where, BadRow(where, f"broken JSON: {problem.msg} at column {problem.colno}")


def _json(path: Path) -> Iterator[Read]:
    try:
        content = json.loads(_decoded(_bytes(path)))
    except json.JSONDecodeError as problem:
        raise LuthierError(
            f"broken JSON: {problem.msg} at column {problem.colno}",
            where=f"{path}:{problem.lineno}",
            mend="mend the file; a file with one object a line should be named .jsonl",
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise LuthierError("the file holds neither a list of objects nor an object with one under `data`", where=str(path))
    return _enumerated(content, f"{path}, item")


def _separated(path: Path, delimiter: str) -> Iterator[Read]:
    # The csv module refuses values over 128 KiB unless told otherwise, and documents are longer than that.
    csv.field_size_limit(_LONGEST_CSV_VALUE)
    reader = csv.DictReader(io.StringIO(_decoded(_bytes(path)), newline=""), delimiter=delimiter, strict=True)
    header = list(reader.fieldnames or [])
    if len(set(header)) < len(header) or not all(header):
        raise LuthierError("the header names a column twice, or not at all", where=f"{path}:1", mend="name every column")
    read: list[Read] = []
    for record in reader:
        where = f"{path}:{reader.line_num}"
        if None in record or None in record.values():
            count = sum(value is not None for value in record.values()) + len(record.get(None) or [0]) - 1
            read.append((where, BadRow(where, f"the row has {count} values, but the header names {len(header)} columns")))
        else:
            read.append((where, record))
    return iter(_with_numbers(read, header))


def _with_numbers(read: list[Read], header: Sequence[str]) -> list[Read]:
    """Free columns become numbers where every value of the column is one; text of a shape never does."""
    records = [record for _, record in read if not isinstance(record, BadRow)]
    makers = {key: _maker([record[key] for record in records]) for key in header if key not in text_keys()}
    return [
        (where, record)
        if isinstance(record, BadRow)
        else (where, {key: makers.get(key, str)(value) for key, value in record.items()})
        for where, record in read
    ]


def _maker(values: Sequence[str]) -> Callable[[str], float | int | str]:
    if values and all(_WHOLE.fullmatch(value) for value in values):
        return int
    if values and all(_NUMBER.fullmatch(value) for value in values):
        return float
    return str


def _parquet(path: Path) -> Iterator[Read]:
    with pyarrow.parquet.ParquetFile(path) as file:
        records = (record for batch in file.iter_batches() for record in batch.to_pylist())
        yield from _enumerated(records, f"{path}, row")


def _document(path: Path) -> Iterator[Read]:
    yield str(path), {"text": _decoded(_bytes(path))}


def _enumerated(records: Iterable[Any], place: str) -> Iterator[Read]:
    for number, record in enumerate(records, start=1):
        yield f"{place} {number}", _object(record, f"{place} {number}")


def _object(value: Any, where: str) -> Mapping[str, Any] | BadRow:
    if not isinstance(value, Mapping):
        return BadRow(where, f"each row must be an object of keys and values, not {type(value).__name__}")
    if not all(isinstance(key, str) for key in value):
        return BadRow(where, "the keys of a row must be text")
    return value


_FORMATS: dict[str, Callable[[Path], Iterator[Read]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": lambda path: _separated(path, ","),
    ".tsv": lambda path: _separated(path, "\t"),
    ".txt": _document,
}
