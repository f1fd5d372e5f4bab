"""Tables as text: CSV and its relatives, as many programs write them, with every error at its line."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.rows.columns import Columns, keys_of
from luthier.rows.files import opened
from luthier.rows.shapes import BadRow, text_keys

_LONGEST_VALUE = 2**31 - 1
# `007` is a name, not the number 7: a number must begin as it would be written back.
# One with more digits than 64 bits hold is a name too.
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]+)?")
_WINDOWS = "\r\n"


def separated(path: Path, delimiter: str, columns: Columns) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """The rows of a table with a header, each with its line; a row of several lines with its last.

    Free columns become numbers where every value of the column is a finite one; text of a shape never does. Spaces around the names of
    the header are no part of them; where each but the first begins with a space, those before the values are none either. Where lines
    end as Windows ends them, a line break within a value is one character, as everywhere else.

    Args:
        path: the file, which may be gzipped.
        delimiter: what stands between values; for a comma, semicolons or tabs where the header has no comma.
        columns: the keys that columns stand for, which decide whether they are text.

    Raises:
        LuthierError: quotes that do not end, or a header that does not name every column once.
    """
    header: list[str] = []
    whole, number = set(), set()
    for _, record in _table(path, delimiter):
        if isinstance(record, BadRow):
            continue
        if not header:
            header = list(record)
            whole = number = {name for name in header if text_keys().isdisjoint(keys_of(name, columns))}
        whole = {key for key in whole if _WHOLE.fullmatch(record[key])}
        number = {key for key in number if key in whole or _is_number(record[key])}
    makers: dict[str, Callable[[str], float | int | str]] = {**dict.fromkeys(number, float), **dict.fromkeys(whole, int)}
    for where, record in _table(path, delimiter):
        if isinstance(record, BadRow):
            yield where, record
        else:
            yield where, {key: makers.get(key, str)(value) for key, value in record.items()}


def _is_number(value: str) -> bool:
    return _NUMBER.fullmatch(value) is not None and math.isfinite(float(value))


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str] | BadRow]]:
    # The csv module refuses values over 128 KiB unless told otherwise, and documents are longer than that.
    csv.field_size_limit(_LONGEST_VALUE)
    with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        if delimiter == "," and "," not in first:
            delimiter = next((other for other in ";\t" if other in first), ",")
        file.seek(0)
        windows = first.endswith(_WINDOWS)
        lines = _records(path, file, delimiter, spaced=_is_spaced(first, delimiter))
        _, names = next(lines, ("", []))
        header = [name.strip() for name in names]
        if len(set(header)) < len(header) or not all(header):
            raise LuthierError("the header names a column twice, or not at all", where=f"{path}:1", fix="name every column")
        for where, values in lines:
            if len(values) != len(header):
                yield where, BadRow(where, f"the row has {len(values)} values, but the header names {len(header)} columns")
            else:
                texts = (value.replace(_WINDOWS, "\n") for value in values) if windows else values
                yield where, dict(zip(header, texts, strict=True))


def _is_spaced(header: str, delimiter: str) -> bool:
    later = header.split(delimiter)[1:]
    return bool(later) and delimiter != "\t" and all(name.startswith(" ") for name in later)


def _records(path: Path, file: Iterable[str], delimiter: str, *, spaced: bool) -> Iterator[tuple[str, list[str]]]:
    """Lists of values, each with its last line; empty lines are left out."""
    line = ""

    def remembered() -> Iterator[str]:
        nonlocal line
        for one in file:
            line = one
            yield one

    reader = csv.reader(remembered(), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    while True:
        begins = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            raise _broken(path, problem, line, begins, reader.line_num) from None
        if values:
            yield f"{path}:{reader.line_num}", values


def _broken(path: Path, problem: csv.Error, line: str, begins: int, ends: int) -> LuthierError:
    what, fix = str(problem), 'write a `"` within quotes as `""`'
    if "unexpected end of data" in what:
        ends = begins
        what, fix = "a quote opens in this row and never closes", f"{fix}, and close what opens; or the file is damaged"
    elif '\\"' in line:
        what, fix = r'a quote within quotes is written `\"`, and tables write it `""`', r'write `""` instead of `\"`'
    elif begins < ends:
        what += f", in a row that begins in line {begins}"
    return LuthierError(f"the file cannot be read: {what}", where=f"{path}:{ends}", fix=fix)
