"""Ids of rows: a record's own, or one derived from its content, so that shuffling or extending a file renames nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Protocol
from uuid import UUID

import numpy

from luthier.errors import LuthierError


class Seen(Protocol):
    """Remembers ids."""

    def place(self, id: str) -> str | None:
        """Where an id came before; None where it did not."""

    def add(self, id: str, where: str) -> None:
        """Remember an id."""


class Places:
    """Remembers ids and their places, some 200 bytes a row."""

    def __init__(self) -> None:
        self._where: dict[str, str] = {}

    def place(self, id: str) -> str | None:
        """Where an id came before."""
        return self._where.get(id)

    def add(self, id: str, where: str) -> None:
        """Remember an id."""
        self._where[id] = where


class Digests:
    """Remembers 8 bytes of each id's digest, some 80 bytes a row, and no places.

    Some two of ten million ids have the same digest with a chance of 3 in a million.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def place(self, id: str) -> str | None:
        """That an id came before."""
        return "an earlier row" if digest(id) in self._seen else None

    def add(self, id: str, where: str) -> None:
        """Remember an id."""
        self._seen.add(digest(id))


class Ids:
    """Hands out ids, no id twice.

    Args:
        seen: remembers them.
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def of(self, record: Mapping[str, Any], where: str) -> str:
        """The id of a record.

        Raises:
            LuthierError: the record's own id is not one, or another record has it; or its text is not valid UTF-8.
        """
        content = canonical({key: value for key, value in record.items() if key != "id"})
        try:
            encoded = content.encode()
        except UnicodeEncodeError as problem:
            # Bytes that are no UTF-8 become surrogates of this range only; others are halves that somebody wrote.
            if "\udc80" <= content[problem.start] <= "\udcff":
                broken = content[max(0, problem.start - 20) : problem.start]
                raise LuthierError(f"the text after {broken!r} is not valid UTF-8", fix="save the file as UTF-8") from None
            raise half_character(problem) from None
        own = record.get("id")
        if own is None:
            return self._derived(hashlib.sha1(encoded, usedforsecurity=False).hexdigest()[:12], where)
        if isinstance(own, bool) or not isinstance(own, str | int) or own == "":
            raise LuthierError(f"`id` must be text or a whole number, not {own!r}", fix="fix the id, or remove the key")
        if isinstance(own, str) and not own.isprintable():
            raise LuthierError(f"the id {own!r} holds characters that cannot be printed", fix="fix the id, or remove the key")
        before = self._seen.place(str(own))
        if before is not None:
            raise LuthierError(
                f"the id `{own}` is already that of {before}",
                fix="give every row its own id, or remove the key `id` to have ids derived from the content",
            )
        self._seen.add(str(own), where)
        return str(own)

    def _derived(self, content: str, where: str) -> str:
        derived, occurrence = content, 1
        while self._seen.place(derived) is not None:
            occurrence += 1
            derived = numbered(content, occurrence)
        self._seen.add(derived, where)
        return derived


def numbered(content: str, occurrence: int) -> str:
    """The derived id of the first row with some content, of the second, and so on."""
    return content if occurrence == 1 else f"{content}-{occurrence}"


def parted(derived: str) -> tuple[str, int]:
    """The content that a derived id names, and which row with that content it is, from 1."""
    content, _, occurrence = derived.partition("-")
    return content, int(occurrence or 1)


def same_id(id: str, where: str, other: str) -> LuthierError:
    """What to say of two rows of different sources that have the same id of their own."""
    return LuthierError(
        f"two rows have the id `{id}`",
        where=f"{where} and {other}",
        fix="make the ids differ, or remove the key `id` to have ids derived from the content",
    )


def half_character(problem: UnicodeEncodeError) -> LuthierError:
    """What to say of a text that holds one of the two halves in which JSON escapes some characters."""
    before, code = problem.object[max(0, problem.start - 20) : problem.start], ord(problem.object[problem.start])
    return LuthierError(
        f"the text after {before!r} is not valid UTF-8: `\\u{code:04x}` is half a character, and its other half is missing",
        fix="write both halves or none",
    )


def digest(id: str) -> int:
    """8 bytes of an id's SHA-256, as a signed number."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "little", signed=True)


def digest_of_tokens(members: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> int:
    """8 bytes of the SHA-256 of rows that belong together as models read them, token ids and which of them are labels."""
    found = hashlib.sha256()
    for token_ids, supervised in members:
        found.update(len(token_ids).to_bytes(8, "little"))
        found.update(numpy.asarray(token_ids, dtype=numpy.int64).tobytes())
        found.update(numpy.asarray(supervised, dtype=numpy.bool_).tobytes())
    return int.from_bytes(found.digest()[:8], "little", signed=True)


def canonical(value: Any) -> str:
    """A value as JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        # A row within a row.
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, date | time | timedelta | Decimal | bytes | UUID):
        return str(value)
    raise LuthierError(f"a row cannot hold a value of the type {type(value).__name__}", fix="make it text or a number")
