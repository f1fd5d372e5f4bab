"""Two measurements of the same items: the difference, its interval, a paired test, and the verdict on it.

`better` and `worse` need all three: a paired test below a false-positive rate of 5 %, an interval of the difference
that does not hold 0, and a difference larger than what repeating the measurement changes. `no change` is a claim, too: it needs an interval
that holds no change that matters, which is `SHARE_THAT_MATTERS` or `PART_THAT_MATTERS`. All else is `unclear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy

from luthier.evaluate.choose import is_of_task, metric_of
from luthier.evaluate.intervals import (
    FALSE_POSITIVES,
    FEWEST,
    Interval,
    Numbers,
    bootstrap,
    exchanged,
    mcnemar,
    newcombe,
    resampled,
    sign_flip,
)
from luthier.evaluate.items import Item, is_binary, numbers_of, weigh_alike
from luthier.evaluate.metrics import METRICS

BETTER, WORSE, NO_CHANGE, UNCLEAR, NOT_MEASURED = "better", "worse", "no change", "unclear", "not measured"
SHARE_THAT_MATTERS = 0.05
"""The smallest change of a share that matters: 5 percentage points."""
PART_THAT_MATTERS = 0.02
"""The smallest change of a loss, a perplexity or another number that matters, as a part of the value before."""


class Difference(NamedTuple):
    """After minus before."""

    value: float
    interval: Interval | None
    p_value: float


def matters(metric: str, before: float) -> float:
    """The smallest change that matters, in units of a metric's value.

    Args:
        metric: its name.
        before: the value that changes.
    """
    # A metric of your own may have any scale.
    if metric in METRICS and METRICS[metric].needs not in ("likelihood", "value"):
        return SHARE_THAT_MATTERS
    if is_of_task(metric) and 0 <= before <= 1 and _plain_name(metric) not in (*_EXPONENTIAL, "bits_per_byte"):
        return SHARE_THAT_MATTERS
    return PART_THAT_MATTERS * abs(before)


def value_of(metric: str, items: Sequence[Item]) -> float:
    """What items come to: the weighted mean of their scores, for perplexity e to its power, or the metric's own value of a set."""
    of_set = metric_of(metric, higher_is_better=True).of_set
    if of_set is not None:
        return of_set(numbers_of(items))
    mean = numpy.average([item.score for item in items], weights=[item.weight for item in items])
    return float(statistic_of(metric)(mean))


def difference_of(metric: str, before: Sequence[Item], after: Sequence[Item], *, higher_is_better: bool = True) -> Difference:
    """The paired difference: McNemar's test where items are right or wrong, a sign-flip test where they are graded.

    Args:
        metric: of both.
        before: the items as they were.
        after: the same items, in the same order.
        higher_is_better: of a metric of your own.
    """
    value = value_of(metric, after) - value_of(metric, before)
    of_set = metric_of(metric, higher_is_better=True).of_set
    if of_set is not None:
        return _of_sets(of_set, value, before, after)
    pairs = list(zip(before, after, strict=True))
    higher = metric_of(metric, higher_is_better=higher_is_better).higher_is_better
    if higher and is_binary(before) and is_binary(after) and weigh_alike(before):
        both = sum(old.score == 1 == new.score for old, new in pairs)
        lost = sum(old.score > new.score for old, new in pairs)
        gained = sum(old.score < new.score for old, new in pairs)
        interval = newcombe(both, lost, gained, len(pairs) - both - lost - gained)
        return Difference(value, interval, mcnemar(lost, gained))
    score_2N = numpy.array([[item.score for item in items] for items in (before, after)])
    weight_N = numpy.array([item.weight for item in before])
    p_value = sign_flip((score_2N[1] - score_2N[0]) * weight_N)
    if len(pairs) < FEWEST:
        return Difference(value, None, p_value)
    statistic = statistic_of(metric)
    return Difference(value, bootstrap(score_2N, weight_N, lambda mean_2S: statistic(mean_2S[1]) - statistic(mean_2S[0])), p_value)


def _of_sets(of_set: Callable[[Numbers], float], value: float, before: Sequence[Item], after: Sequence[Item]) -> Difference:
    """The paired difference of values that are no means: rows are resampled with what both models say of them."""
    old_NM, new_NM = numbers_of(before), numbers_of(after)
    interval = None
    if len(before) >= FEWEST:
        interval = resampled(lambda chosen_N: of_set(new_NM[chosen_N]) - of_set(old_NM[chosen_N]), rows=len(before))
    return Difference(value, interval, exchanged(old_NM, new_NM, of_set))


def verdict_of(
    difference: Difference, metric: str, before: float, n: int, noise: float | None = None, *, higher_is_better: bool = True
) -> tuple[str, str]:
    """The verdict on a difference, and why where that needs words.

    Args:
        difference: from `difference_of`.
        metric: what was measured.
        before: the value before.
        n: items.
        noise: what repeating the measurement changes; None where that was not measured.
        higher_is_better: of a metric of your own.
    """
    if n < FEWEST:
        return NOT_MEASURED, f"{n} items cannot show a change at a false-positive rate of 5 %: at least {FEWEST} can"
    low, high = difference.interval or (-math.inf, math.inf)
    shown = difference.p_value < FALSE_POSITIVES and not low <= 0 <= high
    hidden = shown and noise is not None and abs(difference.value) <= noise
    if shown and not hidden:
        better = (difference.value > 0) == metric_of(metric, higher_is_better=higher_is_better).higher_is_better
        return (BETTER if better else WORSE), ""
    margin = matters(metric, before)
    alike = -margin < low <= high < margin or low == high == 0
    note = f"repeating the measurement of the base changes as much: {noise:.3g}" if hidden else ""
    return (NO_CHANGE if alike else UNCLEAR), note


def recorded(entry: Mapping[str, Any]) -> list[Item] | None:
    """The items after training as an entry of `metrics` in `run.json` keeps them; None where it keeps too little to pair them.

    Args:
        entry: made by `luthier.evaluate.compare.compare`.
    """
    kept = entry.get("items") or ()
    if not kept or any(not isinstance(one.get("after_score"), (int, float)) for one in kept):
        return None
    if metric_of(str(entry.get("metric")), higher_is_better=True).of_set is not None and not all(
        one.get("after_numbers") for one in kept
    ):
        return None
    items = [
        Item(
            str(one.get("id", "")),
            str(one.get("prompt", "")),
            one.get("expected") or "",
            str(one.get("after") or ""),
            float(one["after_score"]),
            float(one.get("weight", 1.0)),
            tuple(one.get("after_numbers") or ()),
        )
        for one in kept
    ]
    # A run of an earlier version kept no weights: then the mean is another one than the value that it tells.
    value = entry.get("after")
    if not isinstance(value, (int, float)) or not math.isclose(
        value_of(str(entry.get("metric")), items), value, rel_tol=1e-6, abs_tol=1e-9
    ):
        return None
    return items


def statistic_of(metric: str) -> Callable[[Numbers], Numbers]:
    """From weighted mean scores to a metric's values."""
    return cast(Callable[[Numbers], Numbers], numpy.exp) if _plain_name(metric) in _EXPONENTIAL else lambda mean: mean


_EXPONENTIAL = ("perplexity", "word_perplexity", "byte_perplexity")


def _plain_name(metric: str) -> str:
    """A metric's name without a task's filter."""
    return metric.partition(",")[0]
