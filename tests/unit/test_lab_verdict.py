"""The rule that turns numbers into verdicts, and the interval it stands on."""

from __future__ import annotations

import pytest

from luthier.lab.claim import Arm, Claim, Expectation
from luthier.lab.results import result_of
from luthier.lab.runner import Choice, Ran
from luthier.lab.verdict import judge, rule, t_interval, t_quantile, together


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (29, 2.0452), (30, 2.0423)],
)
def test_quantiles_are_those_of_printed_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-5)


def test_quantiles_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 12), 40, 101):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-9)


def test_the_interval_of_one_two_three() -> None:
    # Deviation 1, standard error 1 / sqrt(3), 4.30265 of them.
    assert t_interval([1, 2, 3]) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)


def test_intervals_of_too_few_or_equal_values() -> None:
    assert t_interval([]) is None and t_interval([3.0]) is None
    assert t_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("mean", "interval", "margin", "expected"),
    [
        (0.3, (0.1, 0.5), 0.0, "supported"),
        (0.3, (0.1, 0.5), 0.3, "supported"),
        (0.3, (0.1, 0.5), 0.31, "inconclusive"),
        (0.3, (0.1, 0.5), 0.51, "refuted"),
        (0.3, (0.0, 0.6), 0.0, "inconclusive"),
        (-0.1, (-0.2, 0.0), 0.0, "refuted"),
        (0.0, (-0.2, 0.2), 0.2, "inconclusive"),
        (0.0, (-0.1, 0.1), 0.2, "refuted"),
    ],
)
def test_more_and_its_mirror(mean: float, interval: tuple[float, float], margin: float, expected: str) -> None:
    assert rule(mean, interval, "more", margin) == expected
    assert rule(-mean, (-interval[1], -interval[0]), "less", margin) == expected


@pytest.mark.parametrize(
    ("interval", "margin", "expected"),
    [
        ((-0.1, 0.1), 0.2, "supported"),
        ((-0.2, 0.1), 0.2, "inconclusive"),
        ((-0.3, -0.1), 0.2, "inconclusive"),
        ((-0.4, -0.2), 0.2, "inconclusive"),
        ((-0.4, -0.21), 0.2, "refuted"),
        ((0.0, 0.1), 0.0, "supported"),
        ((0.0, 0.0), 0.0, "supported"),
        ((-0.1, 0.1), 0.0, "inconclusive"),
        ((-0.2, -0.1), 0.0, "refuted"),
    ],
)
def test_not_less_and_its_mirror(interval: tuple[float, float], margin: float, expected: str) -> None:
    mean = sum(interval) / 2
    assert rule(mean, interval, "not_less", margin) == expected
    assert rule(-mean, (-interval[1], -interval[0]), "not_more", margin) == expected


def test_pairs_are_compared_seed_by_seed() -> None:
    judged = judge([1.0, 3.0, 5.0], [0.0, 1.0, 2.0], "more")
    assert judged.differences == (1.0, 2.0, 3.0) and judged.mean == 2.0
    assert judged.interval == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    assert judged.verdict == "inconclusive" and not judged.note
    # Seeds differ by much more than arms do, and in pairs that does not matter.
    assert judge([1.0, 11.0, 21.1], [0.0, 10.0, 20.0], "more").verdict == "supported"


def test_equal_differences_give_an_interval_without_width() -> None:
    judged = judge([0.5, 0.5], [0.25, 0.25], "more", 0.25)
    assert judged.interval == (0.25, 0.25) and judged.verdict == "supported" and "no width" in judged.note
    assert judge([0.5, 0.5], [0.5, 0.5], "more").verdict == "refuted"
    assert judge([0.5, 0.5], [0.5, 0.5], "not_less").verdict == "supported"
    assert judge([0.5, 0.5], [0.25, 0.25], "not_more", 0.1).verdict == "refuted"


def test_what_is_missing_is_never_a_verdict() -> None:
    one = judge([9.0], [1.0], "more")
    assert (one.mean, one.interval, one.verdict) == (8.0, None, "inconclusive")
    broken = judge([9.0, None, 9.1], [1.0, 1.0, 1.0], "more")
    assert broken.differences == (8.0, None, 8.1) and broken.interval is None and broken.verdict == "inconclusive"
    assert judge([None], [None], "less").mean is None


def test_a_claim_is_its_expectations_together() -> None:
    assert together(["supported", "supported"]) == "supported"
    assert together(["supported", "inconclusive"]) == "inconclusive"
    assert together(["inconclusive", "refuted", "supported"]) == "refuted"
    assert together([]) == "inconclusive"


def test_a_baseline_that_did_not_learn_can_tell_nothing() -> None:
    claim = Claim(
        name="toy",
        title="A toy",
        papers=["2404.18466"],
        rows=[8],
        says="More.",
        stages=lambda setting: [],
        arms=[Arm("full"), Arm("half")],
        expects=[Expectation("learnt", "half", "full", "more", 0.1)],
        measure=lambda finished: {},
        choose=lambda finished: 0.0,
        minutes=1,
        floor={"learnt": 0.5},
    )
    for base, verdict in ((0.5, "supported"), (0.4, "inconclusive")):
        numbers = {"full": ({"learnt": base}, {"learnt": base}), "half": ({"learnt": base + 0.3}, {"learnt": base + 0.3})}
        ran = Ran(claim, "tiny:llama", "0", 2, {"full": Choice(1e-3), "half": Choice(1e-3)}, numbers, 1.0, 4, 0)
        result = result_of(ran)
        assert result["expectations"][0]["verdict"] == "supported"
        assert result["verdict"] == verdict
        assert bool(result["short"]) == (verdict == "inconclusive")
