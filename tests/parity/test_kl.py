"""The KL divergence to the base: the card's numbers by hand, nothing at the base, whatever token weights there are."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch

from luthier.columns.chunked import resolve
from luthier.kinds import Now
from luthier.training.services import view_of
from tests.objectives import TUNES, assert_idle, assert_slopes, assert_trains, drawn, gradient_of, loss_of, total_of
from tests.toys.helpers import gap, gradients, rows_of_eight

EVEN = torch.zeros(1, 2, dtype=torch.float64)
DIRECTIONS = ["forward", "reverse"]


def kl(weight: float = 1.0, direction: str = "forward") -> dict[str, Any]:
    return {"kl": {"weight": weight, "direction": direction}}


def test_two_words_by_hand() -> None:
    """The base is even, the model has logits 1 and 0; the gradient of the forward direction is p - p_base."""
    p = 0.7310585786300049
    forward, reverse = 0.5 * log(0.5 / p) + 0.5 * log(0.5 / (1 - p)), p * log(p / 0.5) + (1 - p) * log((1 - p) / 0.5)
    assert (forward, reverse) == (pytest.approx(0.12011, abs=1e-5), pytest.approx(0.11094, abs=1e-5))
    for direction, value in zip(DIRECTIONS, (forward, reverse), strict=True):
        assert loss_of(kl(1.0, direction), [[1.0, 0.0]], [0], others={"base": EVEN}) == pytest.approx(value, abs=1e-12)
        assert loss_of(kl(0.05, direction), [[1.0, 0.0]], [0], others={"base": EVEN}) == pytest.approx(0.05 * value, abs=1e-12)
    slope = gradient_of(kl(), [[1.0, 0.0]], [0], others={"base": EVEN})[0]
    assert slope == pytest.approx([0.23106, -0.23106], abs=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_is_that_of_finite_differences(direction: str) -> None:
    assert_slopes(kl(1.0, direction), [0, 3, 2, 2], others={"base": drawn(4, 5, seed=9).detach()})


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tune", ["full", "lora", "half"])
def test_at_the_base_it_is_zero_and_so_is_its_gradient(engine: Any, now: Now, tune: str, direction: str) -> None:
    run, batch = engine(tune, objective=kl(1.0, direction)), rows_of_eight()
    column = {"forward": "kl_forward", "reverse": "kl"}[direction]
    assert float(view_of(run.tune, batch, resolve([column]), now)[column].abs().max()) < 1e-12
    assert max(float(one.abs().max()) for one in gradients(run, [batch], now).values()) < 1e-12


def test_reduces_to_no_penalty_at_weight_zero(engine: Any, now: Now) -> None:
    both = ["cross_entropy", kl(0.0)]
    assert gap(*(gradients(engine(objective=one), [rows_of_eight()], now) for one in (both, "cross_entropy"))) == 0.0


def test_no_token_weight_touches_it() -> None:
    """Also where a weight counts fewer targets, the mean is over all."""
    logits, base, share_B = drawn(4, 5), drawn(4, 5, seed=9).detach(), torch.tensor([0.0, 0.5])
    plain = total_of(kl(), logits, [0, 3, 2, 2], rows=[0, 0, 1, 1], others={"base": base})
    for weight in ("dft", "answer_coverage"):
        more = {"rows": [0, 0, 1, 1], "others": {"base": base}, "columns": {"right_share": share_B}}
        assert total_of(kl(), logits, [0, 3, 2, 2], weight=weight, **more).item() == plain.item() > 0.1


def test_the_base_gets_no_gradient() -> None:
    logits, base = drawn(4, 5), drawn(4, 5, seed=9)
    found = torch.autograd.grad(total_of(kl(), logits, [0, 3, 2, 2], others={"base": base}), (logits, base), allow_unused=True)
    assert found[0] is not None and found[1] is None


def test_what_is_no_target_adds_nothing(engine: Any, now: Now) -> None:
    assert_idle(engine, now, ["cross_entropy", "kl"])


@pytest.mark.parametrize("tune", TUNES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, direction: str, tune: Any) -> None:
    assert_trains(engine, now, tune, ["cross_entropy", kl(0.05, direction)])
