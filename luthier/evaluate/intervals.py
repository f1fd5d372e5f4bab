"""Intervals and paired tests: how far a measured value, or the difference of two, can be trusted.

Intervals cover 95 %. Scores of 0 and 1 get score intervals (Wilson; for paired differences Newcombe), which are right
at small counts and at 0 % and 100 %, where resampling would claim certainty. Other scores get a percentile bootstrap
over rows (Efron, 1979), and so do values that are no mean of scores, such as F1. Tests have a false-positive rate of at most 5 %:
McNemar's exact test for scores of 0 and 1, a sign-flip permutation test for others, and for values that are no mean one that exchanges
before and after by row. All are exact, so with fewer than six rows no difference can be shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray

from luthier.errors import LuthierError

Interval = tuple[float, float]
Numbers = NDArray[numpy.float64]
"""One number a row, [N]."""

CONFIDENCE = 0.95
FALSE_POSITIVES = 0.05
FEWEST = 6
"""Rows below which neither test can fall under `FALSE_POSITIVES`: all signs alike have a chance of 2 / 2**N."""

_DEVIATES = 1.959963984540054
"""Standard deviations within which a normal variable falls in 95 of 100 cases."""
_RESAMPLES = 2000
_FLIPS = 9999
_MOST_ENUMERATED = 12
_CHUNK = 2**20
"""Random numbers drawn at a time."""


def wilson(right: int, total: int) -> Interval:
    """The score interval of a share (Wilson, 1927).

    Args:
        right: how many of the items are right.
        total: all items, at least 1.
    """
    share, spread = right / total, _DEVIATES**2 / total
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    # The ends are exact at 0 % and 100 %, where rounding must not cross them.
    return (0.0 if right == 0 else center - half, 1.0 if right == total else center + half)


def newcombe(both: int, lost: int, gained: int, neither: int) -> Interval:
    """The interval of the difference of two shares on the same items, after minus before (Newcombe, 1998, method 10).

    Args:
        both: items right before and after.
        lost: right before only.
        gained: right after only.
        neither: wrong before and after.
    """
    total = both + lost + gained + neither
    before, after = both + lost, both + gained
    (before_low, before_high), (after_low, after_high) = wilson(before, total), wilson(after, total)
    before_share, after_share = before / total, after / total
    difference, phi = after_share - before_share, _phi(both, lost, gained, neither)
    return (
        difference - _joined(after_share - after_low, before_high - before_share, phi),
        difference + _joined(after_high - after_share, before_share - before_low, phi),
    )


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _phi(both: int, lost: int, gained: int, neither: int) -> float:
    """The correlation of a fourfold table, brought closer to 0 by a continuity correction where it is positive."""
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    if not margins:
        return 0.0
    surplus = float(both * neither - lost * gained)
    if surplus > 0:
        surplus = max(surplus - (both + lost + gained + neither) / 2, 0.0)
    return surplus / math.sqrt(margins)


def bootstrap(values_MN: ArrayLike, weight_N: ArrayLike, statistic: Callable[[Numbers], Numbers], *, seed: int = 0) -> Interval:
    """The percentile bootstrap interval of a statistic of weighted means. Rows are resampled with all measurements.

    Args:
        values_MN: M measurements of each row.
        weight_N: what each row counts, such as its tokens.
        statistic: from the resampled means [M, S] to [S].
        seed: of the resampling.
    """
    values, weights = numpy.asarray(values_MN, numpy.float64), numpy.asarray(weight_N, numpy.float64)
    generator = numpy.random.default_rng(seed)
    total, found = len(weights), []
    for size in _chunks(_RESAMPLES, total):
        chosen_SN = generator.integers(0, total, (size, total))
        weight_SN = weights[chosen_SN]
        found.append(statistic((values[:, chosen_SN] * weight_SN).sum(-1) / weight_SN.sum(-1)))
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(numpy.concatenate(found), [tail, 1 - tail])
    return float(low), float(high)


def resampled(statistic: Callable[[NDArray[Any]], float], *, rows: int, seed: int = 0) -> Interval | None:
    """The percentile bootstrap interval of a value that is no mean.

    Args:
        statistic: from the places of the chosen rows [N] to the value.
        rows: N.
        seed: of the resampling.

    Returns:
        The interval; None where too many of the resamples have no value, as with a class that only one row has.
    """
    generator = numpy.random.default_rng(seed)
    found = []
    for _ in range(_RESAMPLES):
        # A resample can lack what the value needs, such as a row of a rare class.
        with suppress(LuthierError):
            found.append(statistic(generator.integers(0, rows, rows)))
    if len(found) < _RESAMPLES / 2:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def exchanged(before_NM: Numbers, after_NM: Numbers, statistic: Callable[[Numbers], float], *, seed: int = 0) -> float:
    """The two-sided p-value of a permutation test on a value that is no mean: before and after may be exchanged by row.

    Args:
        before_NM: the items' numbers before.
        after_NM: those after.
        statistic: from numbers to the value.
        seed: of the exchanges that are drawn where there are too many to try all.
    """
    total = len(before_NM)
    if total <= _MOST_ENUMERATED:
        swaps = ((numpy.arange(2**total)[:, None] >> numpy.arange(total)) & 1).astype(bool)
    else:
        swaps = numpy.random.default_rng(seed).integers(0, 2, (_RESAMPLES - 1, total), dtype=bool)
        swaps = numpy.concatenate([numpy.zeros((1, total), dtype=bool), swaps])

    def distance(swap_N: NDArray[numpy.bool_]) -> float:
        one, other = numpy.where(swap_N[:, None], after_NM, before_NM), numpy.where(swap_N[:, None], before_NM, after_NM)
        return abs(statistic(other) - statistic(one))

    observed = distance(swaps[0])
    # Values in another order round otherwise, and a tie counts as at least as large.
    return float(numpy.mean([distance(swap_N) >= observed - 1e-9 for swap_N in swaps]))


def mcnemar(lost: int, gained: int) -> float:
    """The two-sided p-value of McNemar's exact test: items that changed do so in both directions alike.

    Args:
        lost: items right before only.
        gained: items right after only.
    """
    changed = lost + gained
    tail = sum(math.comb(changed, count) for count in range(min(lost, gained) + 1))
    # Whole numbers divide exactly where a power of one half would vanish.
    return min(1.0, 2 * tail / (1 << changed))


def sign_flip(differences: ArrayLike, *, seed: int = 0) -> float:
    """The two-sided p-value of a permutation test on paired differences: before and after may be exchanged by row.

    Args:
        differences: of each row, after minus before, [N].
        seed: of the flips that are drawn where there are too many to try all.
    """
    differences_N = numpy.asarray(differences, numpy.float64)
    observed = abs(differences_N.sum())
    # Sums in another order round otherwise, and a tie counts as at least as large.
    bar = observed - 1e-9 * numpy.abs(differences_N).sum()
    total = len(differences_N)
    if total <= _MOST_ENUMERATED:
        bits = (numpy.arange(2**total)[:, None] >> numpy.arange(total)) & 1
        return float((numpy.abs((1.0 - 2.0 * bits) @ differences_N) >= bar).mean())
    generator = numpy.random.default_rng(seed)
    extreme = 1
    for size in _chunks(_FLIPS, total):
        signs = 1.0 - 2.0 * generator.integers(0, 2, (size, total), dtype=numpy.int8)
        extreme += int((numpy.abs(signs @ differences_N) >= bar).sum())
    return extreme / (_FLIPS + 1)


def _chunks(draws: int, width: int) -> list[int]:
    size = max(1, min(draws, _CHUNK // width))
    return [min(size, draws - start) for start in range(0, draws, size)]
