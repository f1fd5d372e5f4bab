"""Bounds of options that losses over pairs share."""

from __future__ import annotations

from luthier.errors import LuthierError


def check_beta(beta: float, name: str) -> None:
    """Refuse a beta that is not above 0.

    Raises:
        LuthierError: it is not.
    """
    if not beta > 0.0:
        raise LuthierError(f"beta is {beta}", where=f"{name}: beta", fix="use more than 0; 0.1 is usual")


def check_share(value: float, name: str, option: str, below: float = 0.5) -> None:
    """Refuse a share of wrong labels that would turn the preference round.

    Raises:
        LuthierError: it is not from 0 to below the bound.
    """
    if not 0.0 <= value < below:
        raise LuthierError(f"`{option}` is {value}", where=f"{name}: {option}", fix=f"use at least 0 and less than {below:g}")
