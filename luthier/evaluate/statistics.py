"""Values of a whole set that are no mean of its items' scores: F1, areas under curves, calibration.

Each is a function of the items' numbers [N, M], so that resampling rows resamples it. Of classes the numbers of an item are three times K:
1 for each class that is right, 1 for each that the model names, and the model's probability of each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy
from numpy.typing import NDArray

from luthier.errors import LuthierError
from luthier.evaluate.intervals import Numbers

BINS = 15
"""Of equal width, into which confidence is put; as in Guo et al. (2017)."""

Marks = NDArray[numpy.float64]
"""[N, K]."""


def macro_f1(numbers_NM: Numbers) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN), without classes that are neither right nor named in any item."""
    right_NK, named_NK, _ = _thirds(numbers_NM)
    hits_K, all_K = (right_NK * named_NK).sum(0), right_NK.sum(0) + named_NK.sum(0)
    there_K = all_K > 0
    return float((2 * hits_K[there_K] / all_K[there_K]).mean()) if there_K.any() else 0.0


def micro_f1(numbers_NM: Numbers) -> float:
    """2 TP / (2 TP + FP + FN), counted over all classes together; 0 where nothing is right and nothing named."""
    right_NK, named_NK, _ = _thirds(numbers_NM)
    total = right_NK.sum() + named_NK.sum()
    return float(2 * (right_NK * named_NK).sum() / total) if total else 0.0


def auroc(numbers_NM: Numbers) -> float:
    """The chance that an item of a class has a higher probability of it than one of another, ties being a half; the mean over classes.

    Classes that all items have, or none, are left out.

    Raises:
        LuthierError: that leaves no class.
    """
    return _over_classes(numbers_NM, _area)


def average_precision(numbers_NM: Numbers) -> float:
    """The mean of the precision at each item of a class, in the order of its probability, ties together; the mean over classes.

    Raises:
        LuthierError: as `auroc`.
    """
    return _over_classes(numbers_NM, _precision)


def calibration_error(numbers_NM: Numbers) -> float:
    """The expected calibration error: how far confidence is from accuracy within bins of confidence, weighted by their items."""
    right_NK, _, probability_NK = _thirds(numbers_NM)
    best_N = probability_NK.argmax(1)
    confidence_N, is_right_N = probability_NK.max(1), right_NK[numpy.arange(len(best_N)), best_N]
    bin_N = numpy.clip(numpy.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    gap = numpy.bincount(bin_N, is_right_N - confidence_N, BINS)
    return float(numpy.abs(gap).sum() / len(bin_N))


def entity_f1(numbers_N3: Numbers) -> float:
    """2 TP / (TP + FP + TP + FN), from the entities of each item that are found, that there are, and that the model names; 0 of none."""
    hits, there, named = numbers_N3.sum(0)
    return float(2 * hits / (there + named)) if there + named else 0.0


def _thirds(numbers_NM: Numbers) -> tuple[Marks, Marks, Marks]:
    right_NK, named_NK, probability_NK = numpy.split(numbers_NM, 3, axis=1)
    return right_NK, named_NK, probability_NK


def _over_classes(numbers_NM: Numbers, value: Callable[[Numbers, Numbers], float]) -> float:
    right_NK, _, probability_NK = _thirds(numbers_NM)
    both_K = (right_NK.sum(0) > 0) & (right_NK.sum(0) < len(right_NK))
    if not both_K.any():
        what = "no class is that of some rows and not of others, so nothing can be told apart"
        raise LuthierError(what, fix="add rows of other classes")
    return float(numpy.mean([value(right_NK[:, k], probability_NK[:, k]) for k in both_K.nonzero()[0]]))


def _area(right_N: Numbers, score_N: Numbers) -> float:
    """Mann and Whitney's statistic, from ranks that ties share."""
    _, place_N, count = numpy.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (count.cumsum() - (count - 1) / 2)[place_N]
    positives = right_N.sum()
    return float(((rank_N * right_N).sum() - positives * (positives + 1) / 2) / (positives * (len(right_N) - positives)))


def _precision(right_N: Numbers, score_N: Numbers) -> float:
    _, place_N = numpy.unique(-score_N, return_inverse=True)
    hits, items = numpy.bincount(place_N, right_N), numpy.bincount(place_N)
    return float((hits * hits.cumsum() / items.cumsum()).sum() / right_N.sum())
