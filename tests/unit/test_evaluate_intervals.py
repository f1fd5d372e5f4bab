"""Intervals and tests against numbers worked out by hand or published."""

from __future__ import annotations

import math
from itertools import product

import numpy
import pytest

from luthier.evaluate.intervals import (
    FALSE_POSITIVES,
    FEWEST,
    Numbers,
    bootstrap,
    mcnemar,
    newcombe,
    sign_flip,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe, 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_limits(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    # Right and wrong are the same question.
    assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_is_the_inverse_of_the_score_test() -> None:
    """Each limit is the share p for which (right/total - p) is exactly 1.96 standard errors at p."""
    for right, total in ((3, 7), (50, 60), (1, 2)):
        for limit in wilson(right, total):
            deviates = (right / total - limit) / math.sqrt(limit * (1 - limit) / total)
            assert abs(deviates) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize("counts", [(36, 12, 2, 0), (10, 0, 0, 5), (0, 0, 58, 2), (3, 4, 5, 6)])
def test_newcombe_follows_its_equation_and_is_symmetric(counts: tuple[int, int, int, int]) -> None:
    both, lost, gained, neither = counts
    low, high = newcombe(both, lost, gained, neither)
    assert low <= (gained - lost) / sum(counts) <= high
    assert -1 <= low <= high <= 1
    assert newcombe(both, gained, lost, neither) == pytest.approx((-high, -low), abs=1e-12)


def test_newcombe_gives_the_published_limits() -> None:
    """Newcombe, 1998, "Improved confidence intervals for the difference between binomial proportions based on paired
    data", table II: 36, 12, 2 and 0 pairs, method 10."""
    low, high = newcombe(36, 2, 12, 0)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_newcombe_without_a_change_is_not_certain() -> None:
    low, high = newcombe(0, 0, 0, 60)
    assert low == pytest.approx(-wilson(0, 60)[1]) and high == pytest.approx(wilson(0, 60)[1])


def test_newcombe_covers_the_truth() -> None:
    """The interval holds the true difference in about 95 of 100 samples."""
    generator = numpy.random.default_rng(0)
    shares = numpy.array([0.5, 0.05, 0.25, 0.2])
    counts = generator.multinomial(60, shares, 2000)
    held = [low <= 0.2 <= high for low, high in (newcombe(*map(int, count)) for count in counts)]
    assert 0.93 < numpy.mean(held) < 0.98


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(0, 6) == 2 / 64
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)
    assert mcnemar(4, 4) == 1.0
    assert mcnemar(9, 2) == mcnemar(2, 9)
    assert mcnemar(2000, 3000) < 1e-40


def test_sign_flip_tries_all_flips_of_few_rows() -> None:
    differences = [3.0, 1.0, -2.0, 0.5, 0.25]
    flipped = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=5)]
    expected = sum(value >= abs(sum(differences)) for value in flipped) / 32
    assert sign_flip(differences) == pytest.approx(expected)
    assert sign_flip([0.0] * 8) == 1.0
    assert sign_flip([0.1] * 6) == 2 / 64


def test_sign_flip_of_many_rows_agrees_with_the_binomial() -> None:
    """With equal sizes the test is McNemar's."""
    for lost, gained in ((4, 12), (6, 12), (10, 10)):
        differences = [-1.0] * lost + [1.0] * gained
        assert sign_flip(differences) == pytest.approx(mcnemar(lost, gained), abs=0.02)
    assert sign_flip([1.0] * 40) == pytest.approx(1e-4)
    assert sign_flip(range(-20, 30), seed=1) == sign_flip(range(-20, 30), seed=1)


def test_fewer_rows_than_the_fewest_show_nothing() -> None:
    assert sign_flip([1.0] * (FEWEST - 1)) >= FALSE_POSITIVES > sign_flip([1.0] * FEWEST)
    assert mcnemar(0, FEWEST - 1) >= FALSE_POSITIVES > mcnemar(0, FEWEST)


def test_bootstrap_of_a_mean_is_close_to_the_normal_interval() -> None:
    generator = numpy.random.default_rng(3)
    values = generator.normal(2.0, 1.0, 400)
    low, high = bootstrap(values[None], numpy.ones(400), lambda mean: mean[0])
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert bootstrap(values[None], numpy.ones(400), lambda mean: mean[0]) == (low, high)


def test_bootstrap_weighs_rows_by_their_tokens() -> None:
    """Resampling two rows gives three kinds of samples; the mean of both weighs the long row three times."""
    seen: list[float] = []

    def note(mean_1S: Numbers) -> Numbers:
        seen.extend(mean_1S[0].tolist())
        first: Numbers = mean_1S[0]
        return first

    bootstrap([[0.0, 4.0]], [1.0, 3.0], note)
    assert {round(value, 12) for value in seen} == {0.0, 3.0, 4.0}
    assert len(seen) == 2000


def test_bootstrap_keeps_pairs_together() -> None:
    """A constant difference has no spread, however much the rows vary."""
    before = numpy.arange(50.0)
    low, high = bootstrap([before, before + 0.5], numpy.ones(50), lambda mean: mean[1] - mean[0])
    assert (low, high) == pytest.approx((0.5, 0.5), abs=1e-12)
