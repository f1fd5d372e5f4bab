"""When a replication holds, when it does not, and when that cannot be told: a rule that was fixed before any replication was run under it.

Variants are compared in pairs, seed by seed. The rule looks twice at most, at 8 seeds and at 16, and a replication goes on to the second
look exactly when its main expectation is undecided at the first. At each look the mean of the differences gets an interval by Student's t
at the same level of 97.2 %, 2.76 standard errors wide to either side at 8 seeds and 2.43 at 16. Looking twice at intervals of 95 % would be
wrong in more than 5 of 100 cases; at this level both looks together are wrong in 5 of 100 (Pocock, 1977, whose 0.0294 is for a known
deviation; 0.028 keeps the 5 % with a deviation estimated from so few seeds). O'Brien and Fleming's design spends next to nothing of it at
the first look, whose interval would be half as wide again: then nearly every replication would need 16 seeds, and that is what this rule is
meant to save. The interval that is shown is the one of the last look, a repeated confidence interval (Jennison and Turnbull, 1989): it
covers the true difference in 95 of 100 cases whatever made the rule stop. With a margin m:

| direction | holds | does not hold |
| --- | --- | --- |
| more | the interval lies above 0 and the mean is at least m | the interval lies below m (m = 0: not above 0) |
| less | the interval lies below 0 and the mean is at most -m | the interval lies above -m (m = 0: not below 0) |
| not_less | the interval lies above -m (m = 0: not below 0) | the interval lies below -m |
| not_more | the interval lies below m (m = 0: not above 0) | the interval lies above m |

Of everything else the lab cannot tell. So of one seed, which gives no interval, and where a variant has no number at some seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from luthier.evaluate.intervals import CONFIDENCE, Interval
from luthier.lab.replication import Direction, Replication

Verdict = Literal["holds", "does not hold", "cannot tell"]
HOLDS: Verdict = "holds"
HOLDS_NOT: Verdict = "does not hold"
CANNOT_TELL: Verdict = "cannot tell"
LEVEL = 0.028
"""The chance that a look's interval misses the true difference, at each of two looks."""


class Design(NamedTuple):
    """At how many seeds the lab looks at a replication, and how sure each look must be."""

    looks: tuple[int, ...]
    """Seeds at each look, growing."""
    level: float
    """The chance that one look's interval misses the true difference."""
    lab: bool = True
    """Whether this is the lab's rule, and not a number of seeds that somebody asked for."""


TWO_LOOKS = Design((8, 16), LEVEL)


def design_of(replication: Replication, seeds: int | None = None) -> Design:
    """How a replication is looked at: by the rule, or once at the number of seeds that was asked for.

    Args:
        replication: one that names its seeds is looked at once, at these.
        seeds: what somebody asked for instead.
    """
    if seeds is not None:
        return Design((seeds,), 1 - CONFIDENCE, lab=False)
    return TWO_LOOKS if replication.seeds is None else Design((replication.seeds,), 1 - CONFIDENCE)


class Judged(NamedTuple):
    """What came of one expectation."""

    differences: tuple[float | None, ...]
    """Of each seed, variant minus versus; None where one of them has no number."""
    mean: float | None
    interval: Interval | None
    verdict: Verdict
    note: str = ""


def judge(
    variant: Sequence[float | None],
    versus: Sequence[float | None],
    direction: Direction,
    margin: float = 0.0,
    level: float = 1 - CONFIDENCE,
) -> Judged:
    """Compare two variants seed by seed.

    Args:
        variant: the measure of each seed; None where the variant has no number.
        versus: the same of the other variant, in the same order.
        direction: what is expected of the differences.
        margin: at least 0, in units of the measure.
        level: the chance that the interval misses the true difference.
    """
    differences = tuple(None if one is None or other is None else one - other for one, other in zip(variant, versus, strict=True))
    known = [one for one in differences if one is not None]
    mean = fmean(known) if known else None
    if len(known) < len(differences):
        return Judged(differences, mean, None, CANNOT_TELL, "some seeds have no number")
    interval = t_interval(known, level)
    if mean is None or interval is None:
        return Judged(differences, mean, None, CANNOT_TELL, "one seed gives no interval")
    note = "all seeds agree exactly, so the interval has no width" if interval[0] == interval[1] else ""
    return Judged(differences, mean, interval, rule(mean, interval, direction, margin), note)


def rule(mean: float, interval: Interval, direction: Direction, margin: float) -> Verdict:
    """The rule of this module's table."""
    low, high = interval
    if direction in ("less", "not_more"):
        # The same questions, of the negated differences.
        mean, low, high = -mean, -high, -low
    if direction in ("more", "less"):
        holds = low > 0 and mean >= margin
        fails = high < margin or (margin == 0 and high <= 0)
    else:
        holds = low > -margin or (margin == 0 and low >= 0)
        fails = high < -margin
    return HOLDS if holds else HOLDS_NOT if fails else CANNOT_TELL


def t_interval(values: Sequence[float], level: float = 1 - CONFIDENCE) -> Interval | None:
    """The interval of a mean by Student's t, which misses it with a chance of `level`; None for fewer than two values."""
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return values[0], values[0]
    half = t_quantile(len(values) - 1, level) * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return mean - half, mean + half


@cache
def t_quantile(freedom: int, level: float = 1 - CONFIDENCE) -> float:
    """Within so many standard errors a mean falls but for a share `level` of cases, by degrees of freedom (at least 1).

    Inverts `t_share` by halving a range that is doubled until it holds the answer.
    """
    low, high = 0.0, 1.0
    while t_share(high, freedom) < 1 - level:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < 1 - level else (low, middle)
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
