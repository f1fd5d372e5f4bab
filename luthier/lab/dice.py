"""Random draws for the synthetic benchmark, equal on every platform and version of Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from luthier import draws

Thing = TypeVar("Thing")


class Dice:
    """Draws from one seed. All rest on `random.Random.random`, the one method whose sequence Python promises to keep.

    Args:
        names: what the draws are for; the same names and numbers give the same draws.
    """

    def __init__(self, *names: object) -> None:
        self._random = random.Random(draws.seed_of(*names))

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self._random.random() < probability

    def pick(self, things: Sequence[Thing]) -> Thing:
        """One of the things."""
        return things[int(self._random.random() * len(things))]

    def some(self, things: Sequence[Thing], count: int) -> list[Thing]:
        """So many different ones, in random order."""
        left = list(things)
        return [left.pop(int(self._random.random() * len(left))) for _ in range(count)]

    def shuffled(self, things: Sequence[Thing]) -> list[Thing]:
        """All of them, in random order."""
        return self.some(things, len(things))
