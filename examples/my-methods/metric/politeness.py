"""The smallest metric of your own: the share of answers in which one of some words stands."""

from __future__ import annotations

from typing import Any


def politeness(answer: str, row: dict[str, Any], *, words: tuple[str, ...] = ("please", "thank", "gladly")) -> bool:
    """Share of answers that are polite.

    Args:
        words: what polite answers have one of.
    """
    return any(word in answer.lower() for word in words)
