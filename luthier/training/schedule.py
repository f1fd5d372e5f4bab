"""Schedules: what the learning rate is multiplied with at a step. Plain functions of the steps taken, the warm-up and all steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from luthier.errors import LuthierError, nearest

Schedule = Callable[[float], float]
"""From progress after warm-up (0 to 1) to a factor."""


def constant(progress: float) -> float:
    """One learning rate throughout."""
    return 1.0


def linear(progress: float) -> float:
    """Down to zero in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Down to zero along half a cosine (Loshchilov and Hutter, 2016, arXiv:1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stable_decay(progress: float) -> float:
    """Constant, then down to zero over the last fifth in a straight line (Hu et al., 2024, arXiv:2404.06395)."""
    return min(1.0, (1.0 - progress) / 0.2)


SCHEDULES: Mapping[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "warmup_stable_decay": warmup_stable_decay,
}


def find_schedule(name: str) -> Schedule:
    """A schedule by name."""
    if name not in SCHEDULES:
        raise LuthierError(f"there is no schedule `{name}`", where="train.schedule", fix=nearest(name, SCHEDULES))
    return SCHEDULES[name]


def factor(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """The factor at a step, from 0: it rises over `warmup` steps and reaches 1 at the last of them, then follows the schedule.

    Args:
        schedule: from progress to a factor.
        step: optimizer steps taken before this one.
        steps: all optimizer steps.
        warmup: optimizer steps of the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    return schedule(min(1.0, (step - warmup) / max(1, steps - warmup)))


def warmup_steps(warmup: float, steps: int) -> int:
    """The optimizer steps of a recipe's warm-up, which is a share of all steps below 1, else a number of steps.

    Raises:
        LuthierError: the run is shorter.
    """
    found = round(warmup * steps) if warmup < 1 else int(warmup)
    if found > steps:
        raise LuthierError(
            f"a warm-up of {found} steps is longer than the run, which has {steps}",
            where="train.warmup",
            fix=f"use at most {steps}, or a share below 1, e.g. 0.03",
        )
    return found
