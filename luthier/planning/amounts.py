"""Memory and time as people say them: what is needed is compared with what there is, so a few digits do."""

from __future__ import annotations

_GIB_FROM = 10 * 2**30
"""Bytes from which on memory is told in GiB."""


def unit_of(number_of_bytes: float) -> str:
    """The unit in which an amount of memory is told: MiB, or GiB from 10 of these on."""
    return "GiB" if number_of_bytes >= _GIB_FROM else "MiB"


def memory(number_of_bytes: float, unit: str = "") -> str:
    """Bytes as `586 MiB` or `12.5 GiB`; with a unit the number alone.

    Args:
        number_of_bytes: how many.
        unit: of the numbers beside it; empty: its own.
    """
    own = unit or unit_of(number_of_bytes)
    number = f"{number_of_bytes / 2**30:,.1f}" if own == "GiB" else f"{number_of_bytes / 2**20:,.0f}"
    return number if unit else f"{number} {own}"


def time(seconds: float) -> str:
    """Seconds as `90 seconds`, `12.5 minutes`, `3.5 hours` or `2.1 days`."""
    for below, of, name in ((120, 1, "seconds"), (7200, 60, "minutes"), (172800, 3600, "hours")):
        if seconds < below:
            return f"{seconds / of:.{0 if of == 1 else 1}f} {name}"
    return f"{seconds / 86400:.1f} days"
