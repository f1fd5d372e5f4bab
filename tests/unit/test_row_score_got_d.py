"""GOT-D against numbers worked out by hand, a plain Sinkhorn in float64, an exact solver, and finite differences."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy
import ot
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.methods.row_score import got_d as module
from luthier.methods.row_score.got_d import calibrated, potentials
from luthier.rows.select import ScoringServices
from luthier.rows.shapes import Row

Array = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


def rows_of(points: Sequence[Sequence[float]] | Tensor) -> list[Row]:
    """A row for each point, with the point as its text."""
    texts = [" ".join(repr(float(one)) for one in point) for point in points]
    return [Row(f"row{number}", "text", {"text": text}, "", {}) for number, text in enumerate(texts)]


def points_of(texts: Sequence[str]) -> Tensor:
    return torch.tensor([[float(word) for word in text.split()] for text in texts], dtype=torch.float64)


def scores(pool: Any, target: Any, seed: int = 0, **options: Any) -> Tensor:
    services = ScoringServices(rows_of(target), points_of, "got_d", seed)
    found = registry.make({"got_d": options}, ("row_score",)).values[0].score(rows_of(pool), services)
    return torch.tensor(found, dtype=torch.float64)


def line(*values: float) -> list[list[float]]:
    """Points on a line."""
    return [[value] for value in values]


def cloud(count: int, width: int = 3, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=rng, dtype=torch.float64)


def distances(one: Tensor, other: Tensor) -> Tensor:
    """Written out, another way than the library's."""
    return (one[:, None] - other[None]).square().sum(-1).sqrt()


def sinkhorn(cost_BK: Array, mass_B: Array, mass_K: Array, epsilon: float, steps: int) -> tuple[Array, Array]:
    """The dual potentials of `min <P, C> + epsilon * KL(P || mu x nu)`, by the two conditions that the plan's marginals set."""
    f_B, g_K = numpy.zeros(len(mass_B)), numpy.zeros(len(mass_K))
    for _ in range(steps):
        before_B = f_B
        g_K = -epsilon * logsumexp((f_B[:, None] - cost_BK) / epsilon + numpy.log(mass_B)[:, None], axis=0)
        f_B = -epsilon * logsumexp((g_K[None] - cost_BK) / epsilon + numpy.log(mass_K)[None], axis=1)
        if numpy.abs(f_B - before_B).max() < 1e-15:
            break
    return f_B, g_K


def even(count: int) -> Array:
    return numpy.full(count, 1.0 / count)


def test_two_points_one_target() -> None:
    """A pool at 0 and 1, a target at 1: the cost is 0.5, f = (1, 0) and a constant, d = (1, -1): the point 1 is chosen."""
    cost = distances(torch.tensor(line(0, 1)), torch.tensor(line(1))).double()
    f = potentials(cost, 0.01, 1e-9)
    assert torch.allclose(f, torch.tensor([0.5, -0.5], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(calibrated(f), torch.tensor([1.0, -1.0], dtype=torch.float64), atol=1e-12)
    assert scores(line(0, 1), line(1)).tolist() == pytest.approx([-1.0, 1.0], abs=1e-9)
    assert ot.emd2([0.5, 0.5], [1.0], cost.numpy()) == pytest.approx(0.5)


def test_the_kind_that_is_rare_is_chosen_where_nearest_sees_no_difference() -> None:
    """A pool of three at 0 and one at 10, half the target at each: every row lies on a target row, and only one is missing."""
    pool, target = line(0, 0, 0, 10), line(0, 10)
    cost = distances(torch.tensor(pool), torch.tensor(target)).double()
    f = potentials(cost, 0.01, 1e-9)
    assert float(f[0] - f[3]) == pytest.approx(10 - 0.01 * math.log(3), abs=1e-9) == pytest.approx(9.989, abs=1e-3)
    assert calibrated(f).tolist() == pytest.approx([3.330, 3.330, 3.330, -9.989], abs=1e-3)
    # The mean distance is 5: the same absolute strength.
    assert scores(pool, target, epsilon=0.002).tolist() == pytest.approx([-3.330, -3.330, -3.330, 9.989], abs=1e-3)
    exact = ot.emd(even(4), even(2), cost.numpy(), log=True)[1]["u"]
    assert exact[0] - exact[3] == pytest.approx(10.0, abs=1e-9)


def test_without_its_copies_the_pool_says_nothing() -> None:
    """Copies are the signal: the same points once each are the target itself."""
    assert scores(line(0, 10), line(0, 10)).abs().max() < 1e-9
    assert scores(line(0, 0, 0, 10), line(0, 10)).argmax() == 3


def test_a_pool_that_is_the_target_is_flat_at_small_epsilon_alone() -> None:
    pool = cloud(40)
    spread = [float(found.max() - found.min()) for e in (0.5, 0.01) for found in [scores(pool, pool, epsilon=e)]]
    assert 0.5 < spread[0] < 2.0 and spread[1] < 1e-3


@pytest.mark.parametrize("epsilon", [0.5, 0.2, 0.01])
def test_less_its_own_transport_it_is_flat_at_any_epsilon(epsilon: float) -> None:
    pool = cloud(40)
    target = pool[torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    found = scores(pool, target, epsilon=epsilon, divergence="sinkhorn", tolerance=1e-6)
    assert found.max() - found.min() < 1e-3
    assert scores(line(0, 0, 0, 10), line(0, 10), epsilon=epsilon, divergence="sinkhorn").argmax() == 3


def test_a_pool_that_is_its_target_is_solved_where_it_begins() -> None:
    """Nothing but entropy binds the point at 10 to those at 0: from any other start the steps are too small to be seen."""
    pool = line(0, 0, 0, 10)
    assert scores(pool, pool, divergence="sinkhorn").abs().max() < 1e-9


def test_what_changes_no_more_is_found_and_nothing_is_warned_of() -> None:
    """One target is solved at once, and a tolerance of 0 is met; several need more rounds than the first, which is no warning."""
    cost = distances(torch.tensor(line(0, 1)), torch.tensor(line(1))).double()
    assert potentials(cost, 0.01, 0.0).tolist() == pytest.approx([0.5, -0.5], abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(cloud(12), cloud(5, seed=1) + 1)


def test_scores_are_in_units_of_the_distance() -> None:
    """Of points a thousand times nearer they are a thousand times smaller, for strength and tolerance are shares of the median."""
    pool, target = cloud(12), cloud(5, seed=1) + 1
    whole = scores(pool, target)
    assert torch.allclose(scores(pool / 1024, target / 1024) * 1024, whole, rtol=1e-9)
    assert not torch.allclose(scores(pool, target, tolerance=1.0), whole, rtol=1e-3)


def test_a_constant_means_nothing() -> None:
    f = potentials(distances(cloud(20), cloud(9, seed=1) + 1), 0.05, 1e-9)
    assert torch.allclose(calibrated(f + 1000.0), calibrated(f), atol=1e-11)
    assert calibrated(f + 7.0).argsort().tolist() == f.argsort().tolist()
    others = torch.stack([torch.cat([f[:i], f[i + 1 :]]).mean() for i in range(20)])
    assert torch.allclose(calibrated(f), f - others, atol=1e-12), "the mean of the others, written out"


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_score_is_the_derivative_of_the_dual_value(share: float) -> None:
    """(OT(mu + h (delta_i - mu)) - OT(mu)) / h goes to f_i - <mu, f>; the bare cost <P, C> goes elsewhere."""
    cost = distances(cloud(6), cloud(5, seed=1) + 0.5)
    epsilon, h = share * float(cost.median()), 1e-5
    f = potentials(cost, epsilon, 1e-10).numpy()
    plain = cost.numpy()

    def values(mass: Array) -> tuple[float, float]:
        f_B, g_K = sinkhorn(plain, mass, even(5), epsilon, 20_000)
        plan = mass[:, None] * even(5)[None] * numpy.exp((f_B[:, None] + g_K[None] - plain) / epsilon)
        return float(mass @ f_B + even(5) @ g_K), float((plan * plain).sum())

    dual, bare = values(even(6))
    off_dual, off_bare = [], []
    for i in range(6):
        moved = (1 - h) * even(6)
        moved[i] += h
        dual_i, bare_i = values(moved)
        off_dual.append(abs((dual_i - dual) / h - f[i]))
        off_bare.append(abs((bare_i - bare) / h - f[i]))
    assert max(off_dual) < 5e-5
    assert max(off_bare) > 0.02


@pytest.mark.parametrize(("sizes", "share"), [((7, 4), 0.05), ((30, 12), 0.02), ((12, 30), 0.2)])
def test_potentials_are_those_of_a_plain_sinkhorn(sizes: tuple[int, int], share: float) -> None:
    cost = distances(cloud(sizes[0]), cloud(sizes[1], seed=1) + 0.7)
    epsilon = share * float(cost.median())
    wanted, _ = sinkhorn(cost.numpy(), even(sizes[0]), even(sizes[1]), epsilon, 30_000)
    found = potentials(cost, epsilon, 1e-10)
    assert numpy.abs(found.numpy() - (wanted - wanted.mean())).max() < 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_potentials_go_to_those_of_the_exact_solver(seed: int) -> None:
    """With 7 against 4 rows no sums of weights are equal, so the exact dual is unique but for its constant."""
    cost = distances(cloud(7, seed=seed), cloud(4, seed=seed + 10) + 0.5)
    exact = torch.tensor(ot.emd(even(7), even(4), cost.numpy(), log=True)[1]["u"])
    errors = [
        float((potentials(cost, share * float(cost.median()), 1e-9) - (exact - exact.mean())).abs().max())
        for share in (0.02, 0.002)
    ]
    assert errors[1] < 0.01 * float(cost.median()) and errors[1] < errors[0]


def test_chunks_are_random_and_each_is_centered() -> None:
    pool = torch.cat([cloud(75) * 0.1, cloud(25, seed=1) * 0.1 + 1])
    target = torch.cat([cloud(10, seed=2) * 0.1, cloud(10, seed=3) * 0.1 + 1])
    whole, parts = scores(pool, target, epsilon=0.02), scores(pool, target, epsilon=0.02, chunk=30)
    rare = torch.arange(100) >= 75
    assert torch.equal(whole.topk(25).indices.sort().values, torch.arange(75, 100))
    assert torch.equal(parts.topk(25).indices.sort().values, torch.arange(75, 100)), "also with four chunks"
    assert abs(float(parts.sum())) < 1e-8, "the scores of each chunk sum to 0"
    assert not torch.equal(parts, whole) and parts[rare].min() > parts[~rare].max()
    assert torch.equal(parts, scores(pool, target, epsilon=0.02, chunk=30))
    assert not torch.equal(parts, scores(pool, target, epsilon=0.02, chunk=30, seed=1))
    assert torch.allclose(whole, scores(pool, target, epsilon=0.02, seed=1), atol=1e-3), "one chunk has no draws"
    pairs = scores(line(0, 1, 5, 9), line(1, 4, 6), epsilon=1.0, chunk=2)
    assert pairs.abs().min() > 0 and pairs.sort().values.tolist() == pytest.approx((-pairs).sort().values.tolist(), abs=1e-12)


def test_one_row_and_equal_rows_have_no_direction() -> None:
    assert scores(line(3), line(1)).tolist() == [0.0]
    assert scores(line(2, 2, 2), line(2, 2)).tolist() == [0.0, 0.0, 0.0]


def test_a_row_keeps_its_score_wherever_it_stands() -> None:
    pool, target = cloud(30), cloud(10, seed=1) + 1
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(scores(pool, target)[order], scores(pool[order], target), atol=1e-6)


def test_what_is_not_solved_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ITERATIONS", 200)
    with pytest.raises(LuthierError, match="not solved after 200 iterations"):
        scores(line(0, 0, 0, 10), line(0, 10), epsilon=0.002)


def test_without_pot_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(LuthierError, match="POT is not installed") as caught:
        scores(line(0, 1), line(1))
    assert "luthier[selection]" in caught.value.fix


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"tolerance": -1.0}, {"chunk": 1}, {"divergence": "other"}, {"eps": 1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError) as caught:
        scores(line(0, 1), line(1), **options)
    assert "got_d" in str(caught.value)
