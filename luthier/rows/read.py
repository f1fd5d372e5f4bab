"""Reading rows: from files, folders, the hub, a data set or plain Python, with every unusable record named.

Rows are checked while they are read, so a broken record stops a run before it trains, not in the middle of the night.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow
import pyarrow.parquet

from luthier.errors import LuthierError
from luthier.rows.columns import Columns, fitting, mapped
from luthier.rows.files import TEXTS, Found, LeftOut, Purpose, find, format_of, formats_known, opened
from luthier.rows.ids import Digests, Ids, Places, canonical, half_character
from luthier.rows.separated import separated
from luthier.rows.shapes import BadRow, Row, bad_rows_error, named_shape, row_of

OnBadRow = Literal["stop", "skip"]
Read = tuple[str, Mapping[str, Any] | BadRow]
"""A place, and what stands there: a record, or why there is none."""

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows in the order they were read.

    Args:
        name: what reports call this set.
        rows: the usable rows.
        skipped: the records left out because `on_bad_row` is `"skip"`.
        ignored_files: files of a folder whose format is none of those that can be read.
        files: the files that were read.
        left_out: files beside them that could be read, and why they were not.
    """

    name: str
    rows: tuple[Row, ...]
    skipped: tuple[BadRow, ...] = ()
    ignored_files: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

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
            digest.update(canonical([row.id, row.shape, row.fields, row.columns]).encode() + b"\n")
        return digest.hexdigest()


def read(
    source: str | Path | Rows | Iterable[Mapping[str, Any]],
    *,
    shape: str | None = None,
    on_bad_row: OnBadRow = "stop",
    name: str | None = None,
    purpose: Purpose = "train",
    columns: Columns | None = None,
) -> Rows:
    """Read and check rows.

    Args:
        source: a path to `.jsonl`, `.ndjson`, `.json` (a list, or an object with the list under `data`), `.csv`,
            `.tsv`, `.parquet`, `.arrow`, `.txt` or `.md` (one document), each also gzipped (`.jsonl.gz`) except Parquet and
            Arrow; a folder, also one that `save_to_disk` wrote, or a pattern such as `data/*.jsonl`, read in the order
            of the names; `hub:NAME`, `hub:NAME:SPLIT` or `hub:OWNER/NAME/CONFIG:SPLIT` (split `train` when not given);
            a `datasets.Dataset`; or any Python iterable of mappings. Rows are returned as they are.
        shape: which shape to use where a record's keys fit several.
        on_bad_row: `"stop"` raises one error that names up to five bad records; `"skip"` leaves them out and lists all
            of them in `Rows.skipped`.
        name: what reports call the rows; the file, folder or data set's name when not given.
        purpose: `"train"` leaves files of a folder or pattern out whose names say that they are for testing;
            `"evaluate"` refuses a folder that mixes them with others.
        columns: by key of a row, the column that holds it: see `luthier.rows.columns`.

    Raises:
        LuthierError: the source cannot be opened, a column is not there, a record is unusable, or nothing usable is left.
    """
    if on_bad_row not in ("stop", "skip"):
        raise LuthierError(f"on_bad_row is {on_bad_row!r}", fix='write "stop" or "skip"')
    if isinstance(source, Rows):
        return source
    if shape is not None:
        named_shape(shape)
    records, found = _opened(source, purpose, columns)
    name = name or found.name
    rows: list[Row] = []
    bad: list[BadRow] = []
    for one in _checked(records, Ids(Places()), shape):
        if isinstance(one, BadRow):
            bad.append(one)
        else:
            rows.append(one)
    if bad and (on_bad_row == "stop" or not rows):
        raise bad_rows_error(bad, len(rows) + len(bad))
    if not rows:
        where = str(source) if isinstance(source, str | Path) else name
        raise LuthierError("there are no rows", where=where, fix="check that this is the right file")
    return Rows(name, tuple(rows), tuple(bad), found.ignored, tuple(map(str, found.files)), found.left_out)


def stream(source: str | Path, *, shape: str | None = None, columns: Columns | None = None) -> Iterator[Row | BadRow]:
    """Read and check rows one after the other, keeping only digests of their ids; the arguments are those of `read`.

    Raises:
        LuthierError: the source cannot be opened, or a column is not there.
    """
    if shape is not None:
        named_shape(shape)
    return _checked(_opened(source, columns=columns)[0], Ids(Digests()), shape)


def read_as(
    source: str | Path | Rows | Iterable[Mapping[str, Any]],
    own: Columns | None,
    others: Columns | None,
    *,
    purpose: Purpose = "train",
    shape: str | None = None,
) -> Rows:
    """Read rows beside others, such as those that are measured: with columns of their own, else with those of the others where they have
    all of them, else as they stand.

    Raises:
        LuthierError: as `read`.
    """
    if own is not None or not others or isinstance(source, Rows):
        return read(source, columns=own, purpose=purpose, shape=shape)
    source = source if isinstance(source, str | Path) else list(source)
    fits = fitting((record for _, record in records(source)), others)
    try:
        return read(source, columns=fits, purpose=purpose, shape=shape)
    except LuthierError as problem:
        if fits:
            raise
        hint = "rows.columns does not count here, since these rows lack some of its columns: name theirs under `columns`"
        raise LuthierError(problem.what, where=problem.where, fix="; ".join([problem.fix, hint])) from None


def records(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[Read]:
    """What stands in a source, as it was read and not checked; the places are those of the rows that `read` makes.

    Raises:
        LuthierError: the source cannot be opened.
    """
    return _as_it_stands(source)[0]


def name_of(source: str | Path) -> str:
    """What reports call a source that has no other name."""
    hub = isinstance(source, str) and source.startswith("hub:")
    return str(source).removeprefix("hub:") if hub else find(source).name


def files_of(source: str | Path) -> tuple[Path, ...]:
    """The files that rows are read from, in order; of a data set of the hub, those it was downloaded to.

    Raises:
        LuthierError: the source cannot be opened.
    """
    if isinstance(source, str) and source.startswith("hub:"):
        files = tuple(Path(one["filename"]) for one in _from_hub(source).cache_files)
        if not files:
            raise LuthierError("the data set lies in no files", where=source, fix="download it and give the path")
        return files
    return find(source).files


def _checked(records: Iterable[Read], ids: Ids, shape: str | None) -> Iterator[Row | BadRow]:
    for where, record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        try:
            row = row_of(record, id=ids.of(record, where), where=where, shape=shape)
        except LuthierError as problem:
            yield BadRow(where, problem.what, problem.fix)
        else:
            yield row


def _opened(
    source: str | Path | Iterable[Mapping[str, Any]], purpose: Purpose = "train", columns: Columns | None = None
) -> tuple[Iterator[Read], Found]:
    records, found = _as_it_stands(source, purpose, columns)
    place = str(source) if isinstance(source, str | Path) else found.name
    return (mapped(records, columns, place) if columns else records), found


def _as_it_stands(
    source: str | Path | Iterable[Mapping[str, Any]], purpose: Purpose = "train", columns: Columns | None = None
) -> tuple[Iterator[Read], Found]:
    if isinstance(source, str) and source.startswith("hub:"):
        return _enumerated(map(without_nulls, _from_hub(source)), source), Found((), source.removeprefix("hub:"))
    if isinstance(source, str | Path):
        found = find(source, purpose)
        return _from_files(found.files, columns or {}), found
    if isinstance(source, Mapping):
        keys = ", ".join(map(str, source))
        raise LuthierError(f"rows cannot be read from a {type(source).__name__}", fix=f"give one of its values: {keys}")
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise LuthierError(f"rows cannot be read from a {type(source).__name__}", fix="give a path or a list of mappings")
    columnar = type(source).__module__.partition(".")[0] == "datasets"
    return _enumerated(map(without_nulls, source) if columnar else source, "row"), Found((), type(source).__name__)


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
            fix="check the name, the split and the connection, or download it and give the path",
        ) from problem


def _from_files(files: Sequence[Path], columns: Columns) -> Iterator[Read]:
    for file in files:
        kind = format_of(file)
        if kind is None:
            raise LuthierError(f"`{file.suffix}` files cannot be read", where=str(file), fix=formats_known())
        try:
            yield from separated(file, _DELIMITERS[kind], columns) if kind in _DELIMITERS else _READERS[kind](file)
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as problem:
            raise LuthierError(
                f"the file cannot be read: {problem}",
                where=str(file),
                fix="check that the file is whole and not damaged",
            ) from problem


def _bytes(path: Path) -> bytes:
    with opened(path) as file:
        return file.read()


def _decoded(raw: bytes) -> str:
    # Broken bytes become lone surrogates, which the check of every record's content finds and names by its line:
    # a strict decode would lose the whole file, and a lenient one the evidence.
    return raw.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _json_lines(path: Path) -> Iterator[Read]:
    with opened(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                _refuse_utf16(raw, path)
            line, where = _decoded(raw).strip(), f"{path}:{number}"
            if not line:
                continue
            try:
                record = _object(json.loads(line), where)
                yield where, _in_whole_characters(record, where) if _may_hold_halves(raw) else record
            except json.JSONDecodeError as problem:
                yield where, BadRow(where, f"broken JSON: {problem.msg} at column {problem.colno}", "fix this line")
            # A number of thousands of digits, or brackets a thousand deep.
            except (ValueError, RecursionError) as problem:
                yield where, BadRow(where, f"JSON that cannot be read: {_without_advice(problem)}", "fix this line")


def _without_advice(problem: Exception) -> str:
    """What Python says of a number with too many digits, without how a program might raise the limit."""
    return str(problem).partition("; use sys.")[0]


def _json(path: Path) -> Iterator[Read]:
    raw = _bytes(path)
    _refuse_utf16(raw, path)
    try:
        content = json.loads(_decoded(raw))
    except json.JSONDecodeError as problem:
        raise LuthierError(
            f"broken JSON: {problem.msg} at column {problem.colno}",
            where=f"{path}:{problem.lineno}",
            fix="fix the file; a file with one object a line should be named .jsonl",
        ) from None
    except (ValueError, RecursionError) as problem:
        raise LuthierError(f"JSON that cannot be read: {_without_advice(problem)}", where=str(path), fix="fix the file") from None
    if isinstance(content, Mapping) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise LuthierError(
            "the file holds neither a list of objects nor an object with one under `data`",
            where=str(path),
            fix="write [{...}, {...}], or name a file with one object a line .jsonl",
        )
    items = _enumerated(content, f"{path}, item")
    return ((where, _in_whole_characters(item, where)) for where, item in items) if _may_hold_halves(raw) else items


def _in_whole_characters(record: Mapping[str, Any] | BadRow, where: str) -> Mapping[str, Any] | BadRow:
    if isinstance(record, BadRow):
        return record
    try:
        canonical({key: value for key, value in record.items() if key != "id"}).encode()
    except UnicodeEncodeError as problem:
        half = half_character(problem)
        return BadRow(where, half.what, half.fix)
    return record


def _refuse_utf16(raw: bytes, path: Path) -> None:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise LuthierError(
            "the file is written in UTF-16",
            where=str(path),
            fix="save it as UTF-8; in PowerShell: `| Out-File -Encoding utf8 FILE`",
        )


def _may_hold_halves(raw: bytes) -> bool:
    """Whether JSON escapes parts of characters; where its bytes are no UTF-8, what is wrong is their encoding."""
    return _ESCAPED_SURROGATE.search(raw) is not None and _is_utf8(raw)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _parquet(path: Path) -> Iterator[Read]:
    with pyarrow.parquet.ParquetFile(path) as file:
        records = (without_nulls(record) for batch in file.iter_batches() for record in batch.to_pylist())
        yield from _enumerated(records, f"{path}, row")


def _arrow(path: Path) -> Iterator[Read]:
    with pyarrow.memory_map(str(path)) as source:
        # `save_to_disk` writes the form for streams, most other programs the one for files.
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        records = (without_nulls(record) for batch in batches for record in batch.to_pylist())
        yield from _enumerated(records, f"{path}, row")


def _document(path: Path) -> Iterator[Read]:
    yield str(path), {"text": _decoded(_bytes(path))}


def _enumerated(records: Iterable[Any], place: str) -> Iterator[Read]:
    for number, record in enumerate(records, start=1):
        yield f"{place} {number}", _object(record, f"{place} {number}")


def without_nulls(record: Any) -> Any:
    """A record of columns without the nulls within its values.

    Columns give every object all keys that any object in its place has, with null where it had none. A null that was written on
    purpose cannot be told from these. Keys of the record itself stay: a missing answer is not a missing column.
    """
    return {key: _pruned(value) for key, value in record.items()} if isinstance(record, Mapping) else record


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value


def _object(value: Any, where: str) -> Mapping[str, Any] | BadRow:
    if not isinstance(value, Mapping):
        return BadRow(where, f"each row must be an object of keys and values, not {type(value).__name__}")
    if not all(isinstance(key, str) for key in value):
        return BadRow(where, "the keys of a row must be text")
    return value


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_READERS: dict[str, Callable[[Path], Iterator[Read]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    **dict.fromkeys(TEXTS, _document),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
