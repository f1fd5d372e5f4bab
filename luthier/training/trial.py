"""Two real steps, thrown away: what a run needs here, measured instead of estimated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from luthier import machine
from luthier.training.engine import Engine
from luthier.training.feed import Feed
from luthier.training.loop import Clock

STEPS = 2
"""The first also pays for what is made once; the second is what a step takes."""


@dataclass(frozen=True)
class Measured:
    """What two steps took."""

    peak_memory_bytes: int
    seconds_per_step: float
    """Of the second step."""
    tokens: int
    """Real tokens of that step."""
    seconds: float
    """Projected for the whole run, by tokens."""

    def described(self) -> str:
        """One line."""
        return (
            f"measured on two steps: {self.peak_memory_bytes / 2**20:,.0f} MiB at the peak, {self.seconds_per_step:.2f} seconds for a "
            f"step of {self.tokens:,} tokens, {self.seconds:,.0f} seconds for the whole run"
        )

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {**asdict(self), "how": "measured on two steps"}


def measure(engine: Engine, feed: Feed, clock: Clock) -> Measured:
    """Take two steps with the run's largest step. The engine's numbers move: it cannot be trained with afterwards.

    Args:
        engine: takes the steps.
        feed: gives the micro-batches.
        clock: gives the learning rate of the first step.

    Raises:
        LuthierError: the loss or a gradient is not finite.
    """
    _, batches = feed.at(largest_step(feed))
    now = clock.at(0, 0.0)
    engine.tune.model.train()
    machine.reset_peak(feed.device)
    for _ in range(STEPS):
        machine.wait_for(feed.device)
        began = time.perf_counter()
        engine.step(batches, now)
        machine.wait_for(feed.device)
        seconds = time.perf_counter() - began
    engine.tune.model.eval()
    tokens = sum(batch.tokens for batch in batches)
    return Measured(machine.peak_bytes(feed.device), seconds, tokens, seconds * feed.tokens()[0] / max(tokens, 1))


def size_of(feed: Feed, group: Sequence[int]) -> int:
    """Tokens that a micro-batch computes: with padding where rows are not packed."""
    sizes = feed.rows.sizes.take(group)
    return sum(feed.run(sizes)) if feed.packed else sum(sizes.members or [1] * len(group)) * max(sizes.lengths)


def largest_step(feed: Feed) -> int:
    """The step of the first epoch with the largest micro-batch."""
    steps = feed.epoch(0)[: feed.total()]
    largest = [max((size_of(feed, group) for group in groups if group), default=0) for groups in steps]
    return largest.index(max(largest))
