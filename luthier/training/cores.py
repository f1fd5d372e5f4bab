"""Whether a run has the processor's cores to itself, looked at while it trains: beside other work every step takes longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from luthier import machine
from luthier.machine import CoreTime

EVERY = 30.0
"""Seconds between two looks."""
MUCH = 0.2
"""A share of waiting that is worth a word."""


class CoreWatch:
    """How much of the time in which a run's threads were ready they had to wait for a core.

    Args:
        times: what each thread had of the processor so far.
        now: the time in seconds.
    """

    def __init__(
        self, times: Callable[[], Mapping[str, CoreTime]] = machine.core_times, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.times, self.now = times, now
        self.last, self.looked = times(), now()
        self.told = False

    def word(self) -> str | None:
        """What to say where other work has taken the cores since the last look; once a run, and looked for from time to time alone."""
        if self.told or self.now() - self.looked < EVERY:
            return None
        before, self.last, self.looked = self.last, self.times(), self.now()
        share = waited(before, self.last)
        if share is None or share < MUCH:
            return None
        self.told = True
        return (
            f"other work runs on this machine: for {share:.0%} of the time luthier's threads wait for a core, so steps take longer, "
            "and the times of this run are not those of a quiet machine"
        )


def waited(before: Mapping[str, CoreTime], after: Mapping[str, CoreTime]) -> float | None:
    """The share of waiting in the time in which threads were ready, between two looks; of threads that were there at both."""
    both = before.keys() & after.keys()
    waiting = sum(after[one].waited - before[one].waited for one in both)
    ready = waiting + sum(after[one].computed - before[one].computed for one in both)
    return waiting / ready if ready else None
