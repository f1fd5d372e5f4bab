"""Faults that were here once and were mended, each with the test that holds the right value: with the fix taken back it must fail, by an
assertion on a wrong value or because nothing was refused, never because a name is missing. Where the fault was itself a crash or a wrong
refusal, it says with which words, and a test that fails with these fails by it."""

from __future__ import annotations

from tests.planted.fault import Fault
from tests.planted.mended import clocks, files, rows, runs, techniques

MENDED: tuple[Fault, ...] = (*clocks.FAULTS, *techniques.FAULTS, *rows.FAULTS, *files.FAULTS, *runs.FAULTS)


def by_value(seen: str, raises: str = "") -> bool:
    """Whether a test failed by what it asserts, or by the very error that the fault raised."""
    error = seen.partition(" - ")[2]
    return error.startswith(("AssertionError", "assert ", "Failed: DID NOT RAISE")) or (bool(raises) and raises in error)
