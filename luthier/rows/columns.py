"""Rows whose columns have other names than luthier's keys: which column stands for which key is said beside the rows.

A mapping such as `{"prompt": "customer_question"}` takes a column away and puts its value under the key. What is read so is the same, with
the same ids, as if the column had been renamed in the file; all other columns stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from luthier.errors import LuthierError, nearest
from luthier.rows.shapes import BadRow

Columns = Mapping[str, str]
"""By key of a row, the column that holds its value. A dot leads into a nested record, `data.question`, or a list, `answers.0`."""
Path = tuple[str | int, ...]
KEY = "rows.columns"
_HELD = 1000
"""Records that are held until every column was seen in one of them: rows that lack a key are bad, and name no column."""
_SHOWN = 30
"""Columns that an error names."""


def mapped(
    records: Iterable[tuple[str, Mapping[str, Any] | BadRow]], columns: Columns, source: str
) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    """Records in which the columns stand under the keys they are for.

    Args:
        records: each with its place.
        columns: the mapping. A record may lack some of its columns.
        source: the rows, for errors.

    Raises:
        LuthierError: no record has one of the columns, or a record has one of the keys itself.
    """
    records = iter(records)
    lacking, seen = dict(columns), dict[str, None]()
    held: list[tuple[str, Mapping[str, Any] | BadRow]] = []

    def noted() -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
        for where, record in records:
            if lacking and not isinstance(record, BadRow):
                seen.update(dict.fromkeys(names_in(record)))
                for key in [key for key, column in lacking.items() if path_of(record, column) is not None]:
                    del lacking[key]
            yield where, record
        if lacking and seen:
            raise _unknown(lacking, list(seen), source)

    following = noted()
    for one in following:
        held.append(one)
        if not lacking or len(held) == _HELD:
            break
    for where, record in chain(held, following):
        yield where, record if isinstance(record, BadRow) else renamed(record, columns, where)


def renamed(record: Mapping[str, Any], columns: Columns, where: str = "") -> dict[str, Any]:
    """One record in which the columns it has stand under their keys, and no longer under their own names.

    Raises:
        LuthierError: the record has one of the keys itself.
    """
    paths = {key: path for key, column in columns.items() if (path := path_of(record, column)) is not None}
    rest = dict(record)
    for path in paths.values():
        rest = _without(rest, path)
    for key in paths:
        if key in rest:
            raise LuthierError(
                f"the row has a `{key}` of its own, and `{key}` shall be its `{columns[key]}`",
                where=f"{where} ({KEY}.{key})",
                fix=f"leave `{key}` out of the columns, or give the row's own another name there: own_{key}: {key}",
            )
    return {**{key: _at(record, path) for key, path in paths.items()}, **rest}


def path_of(record: Mapping[str, Any], column: str) -> Path | None:
    """Where a column stands in a record; None where it does not. A key with dots in its name goes before a nested record."""
    if column in record:
        return (column,)
    here: Any = record
    path: list[str | int] = []
    for step in column.split("."):
        if isinstance(here, Mapping) and step in here:
            path.append(step)
        elif isinstance(here, list | tuple) and re.fullmatch("[0-9]{1,9}", step) and int(step) < len(here):
            path.append(int(step))
        else:
            return None
        here = here[path[-1]]
    return tuple(path)


def names_in(record: Mapping[str, Any], depth: int = 2) -> Iterator[str]:
    """The columns of a record, also those of records within it."""
    for key, value in record.items():
        yield key
        if isinstance(value, Mapping) and depth:
            yield from (f"{key}.{inner}" for inner in names_in(value, depth - 1))


def keys_of(column: str, columns: Columns) -> list[str]:
    """The keys that a column becomes; its own name where it stays."""
    return [key for key, one in columns.items() if one == column] or [column]


def fitting(records: Iterable[Any], columns: Columns | None) -> Columns | None:
    """The mapping where the records have all its columns, taken together; else None: they are read as they stand.

    Sets that are measured are read so with the mapping of the training rows, which is theirs only where it fits.

    Args:
        records: records, or what is read as none.
        columns: the mapping, if there is any.
    """
    lacking = dict(columns or {})
    for record in records if lacking else ():
        if isinstance(record, Mapping):
            lacking = {key: column for key, column in lacking.items() if path_of(record, column) is None}
        if not lacking:
            return columns
    return None


def parse_columns(text: str | None) -> dict[str, str] | None:
    """`prompt=question,completion=reply` as a mapping; a comma counts where another `key=` follows.

    Raises:
        LuthierError: the text is of another form, or names a key twice.
    """
    if text is None:
        return None
    found: dict[str, str] = {}
    for piece in re.split(r",(?=\s*\w+\s*=)", text):
        key, sign, column = (part.strip() for part in piece.partition("="))
        if not (sign and key and column) or key in found:
            raise LuthierError(
                f"`{piece}` is not key=column" if key not in found else f"`{key}` stands twice",
                where="--columns",
                fix="write e.g. --columns prompt=question,completion=reply",
            )
        found[key] = column
    return found


def _unknown(lacking: Columns, seen: Sequence[str], source: str) -> LuthierError:
    key, column = next(iter(lacking.items()))
    top = [name for name in seen if "." not in name] or list(seen)
    more = f" and {len(top) - _SHOWN} more" if len(top) > _SHOWN else ""
    there = ", ".join(f"`{name}`" for name in top[:_SHOWN]) + more
    offer = nearest(column, seen)
    near = f"{offer} Else name another" if "did you mean" in offer else "name one of these"
    return LuthierError(
        f"no row has a column `{column}`; there are {there}", where=f"{source} ({KEY}.{key})", fix=f"{near}, or leave `{key}` out"
    )


def _at(record: Any, path: Path) -> Any:
    for step in path:
        record = record[step]
    return record


def _without(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A record without what stands at a path, and without records that are empty then. Lists stay whole: other places refer to theirs."""
    first, *rest = path
    if first not in record:
        return dict(record)
    others = {key: value for key, value in record.items() if key != first}
    inner = record[str(first)]
    if not rest:
        return others
    if not isinstance(inner, Mapping):
        return dict(record)
    left = _without(inner, tuple(rest))
    return {**others, str(first): left} if left else others
