"""The rule that turns numbers into verdicts, and the interval it stands on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from numpy import bool_, float64, zeros
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from luthier.lab.replication import Expectation, Replication, Variant
from luthier.lab.results import result_of
from luthier.lab.runner import Choice, Ran
from luthier.lab.verdict import LEVEL, TWO_LOOKS, Design, design_of, judge, rule, t_interval, t_quantile
from luthier.lab.verdicts import in_words


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (29, 2.0452), (30, 2.0423)],
)
def test_quantiles_are_those_of_printed_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-5)


def test_quantiles_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 12), 40, 101):
        for level in (0.05, LEVEL, 1e-4):
            assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf(1 - level / 2, freedom), rel=1e-9)


def test_the_interval_of_one_two_three() -> None:
    # Deviation 1, standard error 1 / sqrt(3), 4.30265 of them.
    assert t_interval([1, 2, 3]) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)


def test_intervals_of_too_few_or_equal_values() -> None:
    assert t_interval([]) is None and t_interval([3.0]) is None
    assert t_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("mean", "interval", "margin", "expected"),
    [
        (0.3, (0.1, 0.5), 0.0, "holds"),
        (0.3, (0.1, 0.5), 0.3, "holds"),
        (0.3, (0.1, 0.5), 0.31, "cannot tell"),
        (0.3, (0.1, 0.5), 0.51, "does not hold"),
        (0.3, (0.0, 0.6), 0.0, "cannot tell"),
        (-0.1, (-0.2, 0.0), 0.0, "does not hold"),
        (0.0, (-0.2, 0.2), 0.2, "cannot tell"),
        (0.0, (-0.1, 0.1), 0.2, "does not hold"),
    ],
)
def test_more_and_its_mirror(mean: float, interval: tuple[float, float], margin: float, expected: str) -> None:
    assert rule(mean, interval, "more", margin) == expected
    assert rule(-mean, (-interval[1], -interval[0]), "less", margin) == expected


@pytest.mark.parametrize(
    ("interval", "margin", "expected"),
    [
        ((-0.1, 0.1), 0.2, "holds"),
        ((-0.2, 0.1), 0.2, "cannot tell"),
        ((-0.3, -0.1), 0.2, "cannot tell"),
        ((-0.4, -0.2), 0.2, "cannot tell"),
        ((-0.4, -0.21), 0.2, "does not hold"),
        ((0.0, 0.1), 0.0, "holds"),
        ((0.0, 0.0), 0.0, "holds"),
        ((-0.1, 0.1), 0.0, "cannot tell"),
        ((-0.2, -0.1), 0.0, "does not hold"),
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
    assert judged.verdict == "cannot tell" and not judged.note
    # Seeds differ by much more than variants do, and in pairs that does not matter.
    assert judge([1.0, 11.0, 21.1], [0.0, 10.0, 20.0], "more").verdict == "holds"


def test_equal_differences_give_an_interval_without_width() -> None:
    judged = judge([0.5, 0.5], [0.25, 0.25], "more", 0.25)
    assert judged.interval == (0.25, 0.25) and judged.verdict == "holds" and "no width" in judged.note
    assert judge([0.5, 0.5], [0.5, 0.5], "more").verdict == "does not hold"
    assert judge([0.5, 0.5], [0.5, 0.5], "not_less").verdict == "holds"
    assert judge([0.5, 0.5], [0.25, 0.25], "not_more", 0.1).verdict == "does not hold"


def test_what_is_missing_is_never_a_verdict() -> None:
    one = judge([9.0], [1.0], "more")
    assert (one.mean, one.interval, one.verdict) == (8.0, None, "cannot tell")
    broken = judge([9.0, None, 9.1], [1.0, 1.0, 1.0], "more")
    assert broken.differences == (8.0, None, 8.1) and broken.interval is None and broken.verdict == "cannot tell"
    assert judge([None], [None], "less").mean is None


def toy(**keys: Any) -> Replication:
    given: dict[str, Any] = {
        "name": "toy",
        "title": "A toy",
        "papers": ["2404.18466"],
        "rows": [8],
        "says": "More.",
        "stages": lambda setting: [],
        "variants": [Variant("full"), Variant("half")],
        "main": Expectation("learnt", "half", "full", "more", 0.1),
        "measure": lambda finished: {},
        "choose": lambda finished: 0.0,
        "minutes": 1,
    }
    return Replication(**{**given, **keys})


def ran_with(replication: Replication, base: float, half: float) -> Ran:
    numbers = {"full": ({"learnt": base},) * 2, "half": ({"learnt": half},) * 2}
    return Ran(
        replication, "tiny:llama", "0", 2, Design((2,), 0.05), {"full": Choice(1e-3), "half": Choice(1e-3)}, numbers, 1.0, 4, 0
    )


def test_a_replication_is_its_main_expectation_whatever_stands_beside_it() -> None:
    replication = toy(also=[Expectation("learnt", "half", "full", "less"), Expectation("learnt", "half", "full", "more", 0.9)])
    result = result_of(ran_with(replication, 0.5, 0.8))
    assert result["verdict"] == "holds"
    assert [one["verdict"] for one in result["expectations"]] == ["holds", "does not hold", "does not hold"]
    assert in_words(result) == "holds at this scale: learnt 0.3 share of items (0.3 to 0.3), half minus full, 2 seeds"


def test_a_baseline_that_did_not_learn_can_tell_nothing() -> None:
    replication = toy(floor={"learnt": 0.5})
    for base, verdict in ((0.5, "holds"), (0.4, "cannot tell")):
        result = result_of(ran_with(replication, base, base + 0.3))
        assert result["expectations"][0]["verdict"] == "holds"
        assert result["verdict"] == verdict
        assert bool(result["short"]) == (verdict == "cannot tell")


def test_how_often_the_lab_looks() -> None:
    assert design_of(toy()) == TWO_LOOKS == Design((8, 16), 0.028)
    assert design_of(toy(seeds=5)) == Design((5,), pytest.approx(0.05))
    asked = design_of(toy(seeds=5), 3)
    assert asked.looks == (3,) and not asked.lab, "a number that somebody asked for is not the lab's rule"


def normal(dice: Generator, shape: tuple[int, int]) -> NDArray[float64]:
    return dice.standard_normal(shape)


def items(dice: Generator, shape: tuple[int, int]) -> NDArray[float64]:
    """Differences of shares: 60 items, answered with a chance that is near its ceiling and differs from run to run."""
    first, second = (dice.binomial(60, dice.beta(30, 2, shape)) / 60 for _ in range(2))
    return first - second


def heavy(dice: Generator, shape: tuple[int, int]) -> NDArray[float64]:
    """Student's t with three degrees: now and then a run that goes astray."""
    return dice.standard_t(3, shape)


@pytest.mark.parametrize("noise", [normal, items, heavy])
def test_both_looks_together_call_a_difference_in_five_of_a_hundred_nulls(
    noise: Callable[[Generator, tuple[int, int]], NDArray[float64]],
) -> None:
    """Simulated repetitions without a difference. Two looks at 95 % would be wrong in more than eight of a hundred."""
    count = 60_000
    found = verdicts(noise(default_rng(0), (count, 16)), 0.0)
    # Three standard errors of a share of 5 % over so many.
    slack = 3 * math.sqrt(0.05 * 0.95 / count)
    assert (found["more"] | found["less"]).mean() <= 0.05 + slack
    assert found["more"].mean() <= 0.025 + slack and found["less"].mean() <= 0.025 + slack
    if noise is normal:
        assert (found["more"] | found["less"]).mean() == pytest.approx(0.049, abs=0.004)
        twice = verdicts(noise(default_rng(0), (count, 16)), 0.0, level=0.05)
        assert (twice["more"] | twice["less"]).mean() > 0.08


@pytest.mark.parametrize("noise", [normal, items, heavy])
@pytest.mark.parametrize("margin", [0.02, 0.5])
def test_margins_err_in_no_more_than_their_half_of_it(
    noise: Callable[[Generator, tuple[int, int]], NDArray[float64]], margin: float
) -> None:
    """At no difference `more` is hardly ever said to hold; at a difference of the margin itself neither is it denied, nor is a loss of
    just the margin said to be within it."""
    count = 20_000
    slack = 3 * math.sqrt(0.025 * 0.975 / count)
    differences = noise(default_rng(1), (count, 16))
    assert verdicts(differences, margin)["more"].mean() <= 0.025 + slack
    assert verdicts(differences + margin, margin)["not more"].mean() <= 0.025 + slack
    at_loss = verdicts(differences - margin, margin)
    assert at_loss["not_less"].mean() <= 0.025 + slack and at_loss["not not_less"].mean() <= 0.025 + slack


def verdicts(differences: NDArray[float64], margin: float, level: float = LEVEL) -> dict[str, NDArray[bool_]]:
    """The rule for many replications at once, in numpy, by expectation; `not more` is that `more` is said not to hold."""
    found = {}
    for name, is_more in (("more", True), ("less", True), ("not_less", False)):
        values = -differences if name == "less" else differences
        holds, fails = zeros(len(values), bool), zeros(len(values), bool)
        for look in TWO_LOOKS.looks:
            seen = values[:, :look]
            mean = seen.mean(1)
            half = t_quantile(look - 1, level) * seen.std(1, ddof=1) / math.sqrt(look)
            low, high, open_ = mean - half, mean + half, ~(holds | fails)
            now = (low > 0) & (mean >= margin) if is_more else low > -margin
            never = (high < margin if margin else high <= 0) if is_more else high < -margin
            holds, fails = holds | (open_ & now), fails | (open_ & never & ~now)
        found[name], found[f"not {name}"] = holds, fails
    return found


def test_many_replications_at_once_are_judged_as_one_by_one() -> None:
    differences = default_rng(2).standard_normal((40, 16)) + 0.4
    found = verdicts(differences, 0.3)
    for row, more, not_more in zip(differences, found["more"], found["not more"], strict=True):
        for look in TWO_LOOKS.looks:
            verdict = judge(list(row[:look]), [0.0] * look, "more", 0.3, LEVEL).verdict
            if verdict != "cannot tell":
                break
        assert (verdict == "holds", verdict == "does not hold") == (more, not_more)
