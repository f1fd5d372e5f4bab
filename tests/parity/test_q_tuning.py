"""Q-Tuning: corners and smoothed perplexities by hand, strict quantile sets, what is kept and what is not run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.draws import seed_of
from luthier.errors import LuthierError
from luthier.kinds import Now, StepTable
from luthier.methods.token_weight.q_tuning import corners, rank_in_row, smoothed
from luthier.training import objective, rules
from tests.conftest import make_batch, split
from tests.steps import TUNES, Given, assert_trains, step_on
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight

ALL = {"rows": 1.0, "tokens": 1.0}


def weight(**options: Any) -> dict[str, Any]:
    return {"q_tuning": options}


def kept(found: dict[str, list[float]]) -> dict[str, list[int]]:
    """Which targets of each row that was run have a gradient."""
    return {name: [i for i, slope in enumerate(slopes) if slope] for name, slopes in found.items()}


def by_id(*rows: Given) -> dict[str, Given]:
    """Rows under ids whose order in the step's table is their own."""
    return dict(zip(sorted(map(str, range(len(rows))), key=seed_of), rows, strict=True))


def test_corners_by_hand() -> None:
    """One row in each corner: noise, misconception, known, unsure."""
    error_R, doubt_R = torch.tensor([3.0, 2.9, 1.0, 1.1]), torch.tensor([3.0, 1.0, 1.1, 2.9])
    distance_R, wrong_R = corners(error_R, doubt_R)
    # A row as far from both, as the first is, loses no token.
    assert distance_R.tolist() == [3, 1, 2, 1] and wrong_R.tolist() == [False, True, False, False]
    rows = by_id(*(Given([nll], {}, [entropy]) for nll, entropy in zip(error_R.tolist(), doubt_R.tolist(), strict=True)))
    found = step_on(rows, weight(rows=0.5), (2, 2))
    names = list(rows)
    assert found.slopes.keys() == {names[1], names[3]} and found.passes == 2
    assert found.loss == pytest.approx((2.9 + 1.1) / 2)
    assert found.notes == {"q_tuning rows kept": 0.5, "q_tuning labels kept": 0.5, "q_tuning top-up": 0.0}
    every = step_on(rows, weight(rows=1.0))
    assert every.slopes.keys() == set(names) and every.notes["q_tuning top-up"] == 0.5


PERPLEXITY = (1.0, 9.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({}, [0, 3]),
        ({"keep": "high"}, [1, 2]),
        ({"neighbors": 0.0}, [0, 2]),
        ({"edges": "reflect"}, [0, 3]),
        ({"joined": "mean"}, [0, 3]),
        ({"tokens": 0.51}, [0, 1, 3]),
        ({"tokens": 0.75, "edges": "reflect"}, [0, 1, 3]),
        ({"tokens": 0.75, "joined": "mean"}, [0, 2, 3]),
        ({"tokens": 0.25}, [3]),
        ({"tokens": 0.25, "keep": "high"}, [1]),
        ({"tokens": 0.25, "keep": "high", "joined": "mean", "neighbors": 1.0}, [2]),
    ],
)
def test_smoothed_perplexities_by_hand(options: dict[str, Any], places: list[int]) -> None:
    """Scores 5, 5.5, 5.5, 1; with reflected edges 5.5, 5.5, 5.5, 1.5; with averaged neighbors 2.75, 5, 3, 0.75."""
    wrong, right = Given([math.log(one) for one in PERPLEXITY], {}, [0.1] * 4), Given([0.01] * 3, {}, [2.0] * 3)
    found = step_on({"wrong": wrong, "right": right}, weight(**{"rows": 1.0, "tokens": 0.5, **options}))
    assert kept(found.slopes) == {"wrong": places, "right": [0, 1, 2]}
    assert {slope for slopes in found.slopes.values() for slope in slopes} <= {0.0, 1 / (3 + len(places))}


@pytest.mark.parametrize(
    ("joined", "edges", "wanted"),
    [
        ("sum", "zero", [3.5, 6.5, 3.0, 12.0]),
        ("sum", "reflect", [4.0, 8.5, 5.0, 20.0]),
        ("mean", "reflect", [2.75, 7.25, 4.0, 16.0]),
    ],
)
def test_every_edge_reflects_its_own_perplexity(joined: str, edges: str, wanted: list[float]) -> None:
    """Perplexities 2 and 8 in one row, 4 and 16 apart in another: 0.75 of each and 0.25 of its neighbors."""
    columns = {"nll": torch.tensor([2.0, 8.0, 4.0, 16.0], dtype=torch.float64).log()}
    table = StepTable(columns, row_M=torch.tensor([0, 0, 1, 1]), position_M=torch.tensor([3, 4, 1, 5]), of_rows={})
    assert smoothed(table, 0.25, joined, edges).tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_gap_between_targets_is_an_edge() -> None:
    """Perplexities 9 | 1 1, with a token that is no target before the bar: 4.5, 1, 1 and not 5, 5.5, 1."""
    right = Given([0.01], {}, [2.0])
    wrong = Given([math.log(one) for one in (9.0, 1.0, 1.0)], {}, [0.1] * 3, positions=(1, 3, 4))
    found = step_on({"wrong": wrong, "right": right}, weight(rows=1.0, tokens=0.6))
    assert kept(found.slopes)["wrong"] == [1, 2]
    closed = step_on({"wrong": wrong._replace(positions=()), "right": right}, weight(rows=1.0, tokens=0.6))
    assert kept(closed.slopes)["wrong"] == [0, 2]


def test_huge_losses_stay_finite() -> None:
    rows = {"wrong": Given([900.0, 0.1, 800.0, 0.2], {}, [0.1] * 4), "right": Given([0.01], {}, [2.0])}
    found = step_on(rows, weight(rows=1.0, tokens=0.5))
    # Beyond the clamp both spikes count alike: 1 stands between them, 0 and 3 beside one.
    assert kept(found.slopes)["wrong"] == [0, 3] and math.isfinite(found.loss)


def quantile_sets(error_R: Tensor, doubt_R: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    low, high = (torch.tensor([alpha, 1 - alpha], dtype=torch.float64)).unbind()
    wrong = (error_R >= error_R.quantile(high)) & (doubt_R <= doubt_R.quantile(low))
    return wrong, (error_R <= error_R.quantile(low)) & (doubt_R >= doubt_R.quantile(high))


def test_distances_are_the_strict_quantile_sets() -> None:
    rng = torch.Generator().manual_seed(0)
    for count in (2, 5, 16, 41):
        error_R, doubt_R = torch.rand(2, count, dtype=torch.float64, generator=rng)
        distance_R, wrong_R = corners(error_R, doubt_R)
        for alpha in (0.013, 0.1, 0.237, 0.3333, 0.41, 0.499):
            within_R = distance_R <= alpha * (count - 1)
            wrong, unsure = quantile_sets(error_R, doubt_R, alpha)
            assert torch.equal(within_R, wrong | unsure)
            assert bool(wrong_R[wrong].all()) and not bool(wrong_R[unsure].any())


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.9])
def test_the_budget_is_met_and_rows_that_are_right_lose_nothing(share: float) -> None:
    rng = torch.Generator().manual_seed(1)
    rows = {}
    for i in range(21):
        count = int(torch.randint(1, 9, (), generator=rng))
        nll_N, entropy_N = 3 * torch.rand(2, count, dtype=torch.float64, generator=rng)
        rows[f"row{i}"] = Given(nll_N.tolist(), {}, entropy_N.tolist())
    found = step_on(rows, weight(rows=share, tokens=0.5), (5, 9, 7))
    assert len(found.slopes) == round(share * 21)
    means = {name: (sum(row.nll) / len(row.nll), sum(row.entropy) / len(row.nll)) for name, row in rows.items()}
    u, v = ({name: sum(other[k] < mine[k] for other in means.values()) for name, mine in means.items()} for k in (0, 1))
    losers = {name for name, places in kept(found.slopes).items() if len(places) < len(rows[name].nll)}
    assert all(u[name] > v[name] for name in losers)
    for name, places in kept(found.slopes).items():
        count = len(rows[name].nll)
        assert len(places) == (math.ceil(count / 2) if u[name] > v[name] else count)
    targets = sum(len(row.nll) for row in rows.values())
    assert found.notes["q_tuning labels kept"] == pytest.approx(sum(map(len, kept(found.slopes).values())) / targets)
    assert found.notes["q_tuning rows kept"] == pytest.approx(round(share * 21) / 21)
    distance = {name: min(max(20 - u[name], v[name]), max(u[name], 20 - v[name])) for name in found.slopes}
    assert found.notes["q_tuning top-up"] == pytest.approx(sum(one > 10 for one in distance.values()) / len(distance))


def test_one_row_and_one_target_are_kept_where_the_budget_is_less() -> None:
    assert step_on({"a": Given([1.0], {}, [1.0])}, weight(rows=0.25)).slopes == {"a": [1.0]}
    rows = by_id(Given([3.0, 2.0, 4.0], {}, [0.1] * 3), Given([1.0], {}, [1.0]), Given([2.0], {}, [2.0]))
    for least in (1e-9, 0.1):
        assert kept(step_on(rows, weight(rows=least, tokens=least, neighbors=0.0)).slopes) == {next(iter(rows)): [1]}


def test_of_equal_ones_the_first_come_first() -> None:
    """So many that a sort which need not keep their order does not."""
    alike_R = torch.ones(40)
    distance_R, wrong_R = corners(alike_R, alike_R)
    assert distance_R.tolist() == [max(row, 39 - row) for row in range(40)] and not bool(wrong_R.any())
    row_M = torch.tensor([0] * 25 + [1] * 35)
    table = StepTable({}, row_M=row_M, position_M=torch.cat([torch.arange(25), torch.arange(35)]), of_rows={})
    assert rank_in_row(table, torch.ones(60)).tolist() == [*range(25), *range(35)]
    rows = by_id(*[Given([1.0], {}, [1.0])] * 40)
    # The two in the middle are nearest, then the two beside them.
    nearest = sorted(range(40), key=lambda row: (max(row, 39 - row), row))
    for count in (1, 3, 7, 15, 25):
        found = step_on(rows, weight(rows=count / 40)).slopes
        assert found.keys() == {list(rows)[row] for row in nearest[:count]}


def test_reduces_to_cross_entropy(engine: Any, now: Now) -> None:
    plain, everything = (
        gradients(engine(token_weight=one, model=model_of()), [rows_of_eight()], now) for one in (None, weight(**ALL))
    )
    assert gap(everything, plain) < 1e-14


def test_rows_of_which_nothing_is_kept_are_not_run(engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    real = objective.view_of

    def counted(tune: Any, batch: Any, *given: Any, **more: Any) -> Any:
        seen.append((torch.is_grad_enabled(), len(batch.row_ids)))
        return real(tune, batch, *given, **more)

    monkeypatch.setattr(objective, "view_of", counted)
    monkeypatch.setattr(rules, "view_of", counted)
    batches = split(rows_of_eight(), (1,) * 8)
    result = engine(token_weight=weight(rows=0.3)).step(batches, now)
    assert seen == [(False, 1)] * 8 + [(True, 1)] * 2, "seven rows have targets: round(0.3 * 7) are kept"
    assert result.weights is not None and 0 < result.weights.weighted_share < 1
    assert result.notes["q_tuning rows kept"] == pytest.approx(2 / 7)


def test_scores_come_from_clean_rows(engine: Any, now: Now) -> None:
    """Input maps change what is learnt from, not what is chosen."""
    batch, hidden = (
        make_batch([(20, 12)] * 12),
        {"masked_thought": {"mask_probability": 1.0, "warmup": 0.0, "random_share": 0.0, "mask_id": 3}},
    )
    clean = engine(token_weight=weight(rows=0.4), model=model_of()).step([batch], now)
    masked = engine(token_weight=weight(rows=0.4), objective=["cross_entropy", hidden], model=model_of()).step([batch], now)
    assert masked.notes == clean.notes and masked.weights is not None and clean.weights is not None
    assert masked.weights.weighted_share == clean.weights.weighted_share and masked.loss != clean.loss
    found = [
        gradients(
            engine(token_weight=weight(rows=0.4), objective=["cross_entropy", hidden], model=model_of()), split(batch, sizes), now
        )
        for sizes in ((12,), (5, 0, 4, 3))
    ]
    assert gap(found[1], found[0]) < 1e-10


@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_trains_with(engine: Any, now: Now, tune: Any) -> None:
    assert_trains(engine, now, tune=tune, token_weight=weight())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rows": 0.0}, "`rows` is 0.0"),
        ({"rows": 1.1}, "`rows` is 1.1"),
        ({"tokens": 0.0}, "`tokens` is 0.0"),
        ({"neighbors": -0.1}, "`neighbors` is -0.1"),
        ({"neighbors": 1.5}, "`neighbors` is 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        step_on({}, weight(**options))
