"""Faults that were here once and were mended, each with the test that holds the right value: with the mend taken back it must fail, by an
assertion on a wrong value or because nothing was refused, never because a name is missing."""

from __future__ import annotations

from tests.planted.fault import Fault

MENDED: tuple[Fault, ...] = ()


def by_value(seen: str) -> bool:
    """Whether a test failed by what it asserts."""
    return any(word in seen for word in ("AssertionError", "assert ", "DID NOT RAISE"))
