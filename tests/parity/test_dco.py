"""Direct Coverage Optimization: the factor, the gradient of coverage itself, its minimum; and weights from measured shares."""

from __future__ import annotations

from decimal import Decimal, localcontext
from math import inf, log
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.loss_term._coverage import coverage_factor
from tests.conftest import split
from tests.objectives import TUNES, assert_idle, assert_trains, differences, drawn, gradient_of, loss_of, total_of, view_on
from tests.toys.helpers import gap, gradients, rows_of_eight

LABELS, ROWS = [0, 3, 2, 2, 1, 4], [0, 0, 0, 1, 1, 2]


def factor(p: float, samples: int) -> float:
    return float(coverage_factor(torch.tensor(-log(p) if p else inf, dtype=torch.float64), samples))


def exact(p: float, samples: int) -> float:
    """With 80 digits."""
    with localcontext() as context:
        context.prec = 80
        wrong = 1 - Decimal(p)
        return float(samples * wrong ** (samples - 1) * Decimal(p) / (1 - wrong**samples))


@pytest.mark.parametrize("samples", [1, 2, 4, 16, 256, 4096])
def test_the_factor_is_exact_for_every_probability(samples: int) -> None:
    for p in (1e-30, 1e-15, 1e-8, 1e-5, 1e-3, 0.1 / samples, 1 / samples, 0.3, 0.5, 0.7, 0.9, 1 - 1e-6):
        assert factor(p, samples) == pytest.approx(exact(p, samples) if p < 1 else float(samples == 1), abs=1e-14)
    assert factor(0.0, samples) == 1.0
    # A row of 100,000 unlikely tokens.
    assert float(coverage_factor(torch.tensor(1e6), samples)) == 1.0
    assert factor(1.0, samples) == pytest.approx(float(samples == 1), abs=1e-12)
    # As a share of a gradient it is at most 1, also where its parts are rounded up.
    surprisal = torch.linspace(0.0, 60.0, 20_001, dtype=torch.float64)
    assert float(coverage_factor(surprisal, samples).max()) <= 1.0


@pytest.mark.parametrize("samples", [2, 4, 16, 64, 256, 1024, 4096])
def test_it_continues_the_authors_series(samples: int) -> None:
    x, more, most = 0.1 / samples, samples - 1, (samples - 1) * (samples - 2)
    series = (1 - more * x + most * x**2 / 2) / (1 - more * x / 2 + most * x**2 / 6)
    assert factor(x, samples) == pytest.approx(series, abs=1.4e-4)


def test_by_hand() -> None:
    """One token and two tokens of probability one half, four samples; with a gradient in F the slope would be 0.34282."""
    four = {"dco": {"samples": 4}}
    assert factor(0.5, 4) == pytest.approx(0.266667, abs=1e-6) and factor(0.25, 4) == pytest.approx(0.617143, abs=1e-6)
    assert loss_of(four, [[0.0, 0.0]], [0]) == pytest.approx(0.266667 * log(2), abs=1e-6)
    assert gradient_of(four, [[0.0, 0.0]], [0])[0] == pytest.approx([-0.13333, 0.13333], abs=1e-5)
    two = [[0.0, 0.0], [0.0, 0.0]]
    assert loss_of(four, two, [0, 1]) == pytest.approx(0.855542, abs=1e-6)
    assert loss_of({"dco": {"samples": 4, "reduction": "mean"}}, two, [0, 1]) == pytest.approx(0.427771, abs=1e-6)


def lost_coverage(logits: Tensor, samples: int) -> Tensor:
    """The mean over rows of -log(1 - (1 - p)^N)."""
    nll_N = -logits.log_softmax(-1)[torch.arange(len(LABELS)), torch.tensor(LABELS)]
    p_B = torch.stack([(-nll_N[torch.tensor(ROWS) == row].sum()).exp() for row in range(3)])
    return -(1 - (1 - p_B) ** samples).log().mean()


@pytest.mark.parametrize("samples", [1, 4, 64])
def test_the_gradient_is_that_of_coverage(samples: int) -> None:
    leaf = drawn(6, 5)
    (found,) = torch.autograd.grad(total_of({"dco": {"samples": samples}}, leaf, LABELS, rows=ROWS), leaf)
    (wanted,) = torch.autograd.grad(lost_coverage(leaf, samples), leaf)
    assert torch.allclose(found, wanted, atol=1e-13)
    assert torch.allclose(found, differences(lambda one: lost_coverage(one, samples), leaf), atol=1e-9)


def test_one_sample_is_the_summed_cross_entropy_of_rows(engine: Any, now: Now) -> None:
    logits = drawn(6, 5)
    one = total_of({"dco": {"samples": 1}}, logits, LABELS, rows=ROWS)
    assert one.item() == pytest.approx(6 / 3 * total_of("cross_entropy", logits, LABELS, rows=ROWS).item(), abs=1e-14)
    # 30 targets in 7 rows; the model's norms round to fp32 behind another scale.
    found, plain = (
        gradients(engine(objective=name), [rows_of_eight()], now) for name in ({"dco": {"samples": 1}}, "cross_entropy")
    )
    assert gap(found, {name: 30 / 7 * value for name, value in plain.items()}) < 1e-6


@pytest.mark.parametrize(("samples", "top"), [(1, 0.7), (4, 0.505229), (16, 0.379897), (64, 0.344575)])
def test_where_it_ends(samples: int, top: float) -> None:
    """Answers of one token, 7 to 2 to 1: the more samples, the flatter the distribution that covers most.

    There share * F(N, p) / p is the same for all three: the numbers solve that with 40 digits.
    """
    (term,) = registry.part("dco", samples=samples).values
    logits_V = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    descent, share_N = torch.optim.Rprop([logits_V], lr=0.01), torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    for _ in range(200):
        descent.zero_grad()
        view = view_on(logits_V.expand(3, 3), [0, 1, 2], ["nll"], rows=[0, 1, 2])
        term.total(view.for_technique({}, share_N), {}).backward()
        descent.step()
    assert logits_V.softmax(-1).max().item() == pytest.approx(top, abs=2e-6)


def test_token_weights_multiply_the_loss_and_not_the_probability() -> None:
    """Targets of weight 0 are none in the mean."""
    logits, weight_N = drawn(6, 5), torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 0.0], dtype=torch.float64)
    nll_N = -logits.log_softmax(-1)[torch.arange(6), torch.tensor(LABELS)]
    view = view_on(logits, LABELS, ["nll"], rows=ROWS).for_technique({}, weight_N)
    factors = [factor((-nll_N[torch.tensor(ROWS) == row].sum()).exp().item(), 16) for row in range(3)]
    sums = [(weight_N * nll_N)[torch.tensor(ROWS) == row].sum().item() for row in range(3)]
    for reduction, kept in (("sum", (1, 1, 1)), ("mean", (2, 1, 1))):
        (term,) = registry.part("dco", samples=16, reduction=reduction).values
        wanted = sum(f * s / k for f, s, k in zip(factors, sums, kept, strict=True))
        assert term.total(view, {}).item() == pytest.approx(wanted, abs=1e-13)
    assert view.notes["coverage factor"].tolist() == pytest.approx([factors[row] for row in ROWS], abs=1e-14)


def test_answers_are_weighed_by_their_measured_share() -> None:
    """Rows at the threshold or above are left out, also of what the loss is divided by."""
    share_B = torch.tensor([0.05, 0.1, 0.0])
    logits = drawn(6, 5)
    nll_N = -logits.log_softmax(-1)[torch.arange(6), torch.tensor(LABELS)]
    weights = [exact(0.05, 4)] * 3 + [0.0] * 2 + [1.0]
    wanted = (nll_N * torch.tensor(weights, dtype=torch.float64)).sum().item() / 4
    weight = {"answer_coverage": {"samples": 4}}
    found = total_of("cross_entropy", logits, LABELS, weight=weight, rows=ROWS, columns={"right_share": share_B})
    assert found.item() == pytest.approx(wanted, abs=1e-7)
    assert exact(0.05, 4) == pytest.approx(0.924425, abs=1e-6)
    # 0.7 in fp32 is less than 0.7, and still not below a threshold of 0.7.
    weight = {"answer_coverage": {"samples": 4, "threshold": 0.7, "column": "share"}}
    found = total_of("cross_entropy", logits, LABELS, weight=weight, rows=ROWS, columns={"share": torch.tensor([0.7, 0.0, 0.7])})
    assert found.item() == pytest.approx(nll_N[3:5].mean().item(), abs=1e-12)


def test_one_sample_and_no_threshold_is_cross_entropy(engine: Any, now: Now) -> None:
    weight = {"answer_coverage": {"samples": 1, "threshold": 1.1}}
    assert gap(*(gradients(engine(token_weight=one), [rows_of_eight()], now) for one in (weight, None))) < 1e-12


@pytest.mark.parametrize("column", [None, torch.tensor([0.0, torch.nan]), torch.tensor([0.0, 1.5]), torch.tensor([0.0, -0.1])])
def test_a_row_without_a_share_is_named(column: Tensor | None) -> None:
    columns = {} if column is None else {"right_share": column}
    with pytest.raises(LuthierError, match="the column `right_share` of this row is") as caught:
        loss_of("cross_entropy", [[0.0, 0.0]] * 2, [0, 1], weight="answer_coverage", rows=[0, 1], columns=columns)
    assert caught.value.where == ("row row0" if column is None else "row row1")


def test_rows_that_are_all_covered_make_no_step(engine: Any, now: Now) -> None:
    batch = rows_of_eight()
    covered = batch._replace(columns={"right_share": torch.linspace(0.5, 1.0, 8)})
    assert engine(token_weight="answer_coverage").step([covered], now).skipped
    # Without a target nothing is needed.
    run = engine(token_weight="answer_coverage")
    lacks = batch.take(torch.tensor([3]))._replace(columns={})
    assert gap(gradients(run, [batch, lacks], now), gradients(run, split(batch, (4, 4)), now)) < 1e-12


@pytest.mark.parametrize(
    ("objective", "weight"),
    [("dco", None), ({"dco": {"samples": 16, "reduction": "mean"}}, None), ("cross_entropy", "answer_coverage")],
    ids=str,
)
def test_what_is_no_target_adds_nothing(engine: Any, now: Now, objective: Any, weight: Any) -> None:
    assert_idle(engine, now, objective, weight)


@pytest.mark.parametrize("tune", TUNES, ids=str)
@pytest.mark.parametrize(("objective", "weight"), [("dco", None), ("cross_entropy", "answer_coverage"), ("dco", "answer_coverage")])
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, objective: str, weight: Any, tune: Any) -> None:
    assert_trains(engine, now, tune, objective, weight)


@pytest.mark.parametrize(
    ("name", "options"),
    [("dco", {"samples": 0}), ("answer_coverage", {"samples": 0}), ("answer_coverage", {"threshold": 0.0})],
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(LuthierError, match=f"`{next(iter(options))}` is") as caught:
        registry.part(name, **options)
    assert caught.value.where == f"{name}: {next(iter(options))}"
