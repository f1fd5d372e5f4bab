"""When a claim counts as supported or refuted: a rule that was fixed before any claim was run.

Arms are compared in pairs, seed by seed, and the mean of the differences gets a 95 % interval by Student's t. With a margin m:

| direction | supported | refuted |
| --- | --- | --- |
| more | the interval lies above 0 and the mean is at least m | the interval lies below m (m = 0: not above 0) |
| less | the interval lies below 0 and the mean is at most -m | the interval lies above -m (m = 0: not below 0) |
| not_less | the interval lies above -m (m = 0: not below 0) | the interval lies below -m |
| not_more | the interval lies below m (m = 0: not above 0) | the interval lies above m |

Everything else is inconclusive. So is one seed, which gives no interval, and a seed at which an arm has no number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from luthier.evaluate.intervals import CONFIDENCE, Interval
from luthier.lab.claim import Direction

Verdict = Literal["supported", "refuted", "inconclusive"]


class Judged(NamedTuple):
    """What came of one expectation."""

    differences: tuple[float | None, ...]
    """Of each seed, arm minus versus; None where one of them has no number."""
    mean: float | None
    interval: Interval | None
    verdict: Verdict
    note: str = ""


def judge(arm: Sequence[float | None], versus: Sequence[float | None], direction: Direction, margin: float = 0.0) -> Judged:
    """Compare two arms seed by seed.

    Args:
        arm: the measure of each seed; None where the arm has no number.
        versus: the same of the other arm, in the same order.
        direction: what is expected of the differences.
        margin: at least 0, in units of the measure.
    """
    differences = tuple(None if one is None or other is None else one - other for one, other in zip(arm, versus, strict=True))
    known = [one for one in differences if one is not None]
    mean = fmean(known) if known else None
    if len(known) < len(differences):
        return Judged(differences, mean, None, "inconclusive", "some seeds have no number")
    interval = t_interval(known)
    if mean is None or interval is None:
        return Judged(differences, mean, None, "inconclusive", "one seed gives no interval")
    note = "all seeds agree exactly, so the interval has no width" if interval[0] == interval[1] else ""
    return Judged(differences, mean, interval, rule(mean, interval, direction, margin), note)


def rule(mean: float, interval: Interval, direction: Direction, margin: float) -> Verdict:
    """The rule of this module's table."""
    low, high = interval
    if direction in ("less", "not_more"):
        # The same questions, of the negated differences.
        mean, low, high = -mean, -high, -low
    if direction in ("more", "less"):
        supported = low > 0 and mean >= margin
        refuted = high < margin or (margin == 0 and high <= 0)
    else:
        supported = low > -margin or (margin == 0 and low >= 0)
        refuted = high < -margin
    return "supported" if supported else "refuted" if refuted else "inconclusive"


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim's verdict: refuted with any of its expectations, supported with all."""
    if "refuted" in verdicts:
        return "refuted"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "inconclusive"


def t_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of a mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return values[0], values[0]
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return mean - half, mean + half


def t_quantile(freedom: int) -> float:
    """Within so many standard errors a mean falls in 95 of 100 cases, by degrees of freedom (at least 1).

    Inverts `t_share` by halving a range that holds the answer at one degree of freedom, where it is largest.
    """
    low, high = 0.0, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def t_share(within: float, freedom: int) -> float:
    """The chance that Student's t lies between -within and within (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(within / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    total, term = 0.0, cosine if odd else 1.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
