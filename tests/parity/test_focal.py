"""The focal loss of rows: the card's numbers by hand, the formula in float64, rows whose probability underflows."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now
from tests.objectives import TUNES, assert_idle, assert_slopes, assert_trains, drawn, loss_of, total_of, view_on

LABELS, ROWS = [0, 3, 2, 2, 1, 4], [0, 0, 0, 1, 1, 2]


def focal(gamma: float) -> dict[str, Any]:
    return {"focal": {"gamma": gamma}}


def logits_of(*chances: float) -> list[list[float]]:
    """Two words, the first with these probabilities."""
    return [[log(p), log(1 - p)] for p in chances]


@pytest.mark.parametrize(("gamma", "loss"), [(0.0, 0.713558), (2.0, 0.299436)])
def test_two_rows_by_hand(gamma: float, loss: float) -> None:
    """Mean probabilities 0.3 and 0.8, of one token and of two."""
    assert loss_of(focal(gamma), logits_of(0.3, 0.8), [0, 0], rows=[0, 1]) == pytest.approx(loss, abs=1e-6)
    assert loss_of(focal(gamma), logits_of(0.3, 0.9, 0.7), [0, 0, 0], rows=[0, 1, 1]) == pytest.approx(loss, abs=1e-6)


def test_gamma_zero_is_minus_the_logarithm_of_the_mean_probability() -> None:
    logits = drawn(6, 5)
    p_N = logits.softmax(-1)[torch.arange(6), torch.tensor(LABELS)]
    wanted = -torch.stack([p_N[:3].mean(), p_N[3:5].mean(), p_N[5]]).log().mean()
    found = total_of(focal(0.0), logits, LABELS, rows=ROWS)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-14)
    slopes = [torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (found, wanted)]
    assert torch.allclose(*slopes, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_gradient_is_that_of_finite_differences(gamma: float) -> None:
    assert_slopes(focal(gamma), LABELS, rows=ROWS)


def test_weights_weigh_the_mean_and_the_row() -> None:
    """A weight common to a row multiplies its loss, and a token of weight 0 is as if it were no target."""
    weight_N = torch.tensor([0.5, 0.0, 1.5, 3.0, 3.0, 0.0], dtype=torch.float64)
    logits = drawn(6, 5)
    (term,) = registry.part("focal").values

    def total(weight_N: Tensor, chosen: list[int]) -> Tensor:
        labels, rows = [LABELS[i] for i in chosen], [ROWS[i] for i in chosen]
        view = view_on(logits[chosen], labels, ["nll"], rows=rows)
        return term.total(view.for_technique({}, weight_N[chosen]), {})

    p_N = logits.softmax(-1)[torch.arange(6), torch.tensor(LABELS)].tolist()
    first, second = (0.5 * p_N[0] + 1.5 * p_N[2]) / 2.0, (p_N[3] + p_N[4]) / 2
    wanted = -((1 - first) ** 2) * log(first) - 3.0 * (1 - second) ** 2 * log(second)
    found = total(weight_N, list(range(6)))
    assert found.item() == pytest.approx(wanted, abs=1e-14)
    assert total(weight_N, [0, 2, 3, 4]).item() == pytest.approx(wanted, abs=1e-14)
    # A row without any weight leaves no NaN behind.
    (slope,) = torch.autograd.grad(found, logits)
    assert slope.isfinite().all() and float(slope[1].abs().max()) == 0.0 == float(slope[5].abs().max())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_and_impossible_rows_stay_finite(gamma: float) -> None:
    logits = torch.tensor([[400.0, 0.0], [0.0, 400.0], [0.0, 500.0]], requires_grad=True)
    loss = total_of(focal(gamma), logits, [0, 0, 0], rows=[0, 1, 1])
    # log q of the second row is -400 - log 2.
    assert loss.item() == pytest.approx((400 + log(2)) / 2, rel=1e-6)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_a_row_that_is_all_but_certain_keeps_a_slope() -> None:
    """1 - q is 6.9e-13 and is taken to be 1e-12; the logits' own rounding, of 4e-15, leaves its logarithm two digits."""
    assert loss_of(focal(0.5), [[28.0, 0.0]], [0]) == pytest.approx(1e-6 * exp(-28.0), rel=0.05, abs=0.0)


def test_what_is_no_target_adds_nothing(engine: Any, now: Now) -> None:
    assert_idle(engine, now, "focal")


@pytest.mark.parametrize("tune", TUNES, ids=str)
@pytest.mark.parametrize("weight", [None, "dft"])
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, weight: Any, tune: Any) -> None:
    assert_trains(engine, now, tune, "focal", weight)


def test_a_negative_power_is_refused() -> None:
    with pytest.raises(LuthierError, match=r"`gamma` is -1\.0") as caught:
        registry.part("focal", gamma=-1.0)
    assert caught.value.where == "focal: gamma"
