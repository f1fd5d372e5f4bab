"""Label smoothing: PyTorch's numbers, by hand, and cross-entropy without any."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch.nn import functional

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now
from tests.objectives import TUNES, assert_idle, assert_slopes, assert_trains, drawn, gradient_of, loss_of, total_of
from tests.toys.helpers import gap, gradients, rows_of_eight

LABELS = [0, 3, 2, 2, 1, 4]


def smoothed(amount: float) -> dict[str, Any]:
    return {"label_smoothing": {"amount": amount}}


def test_two_words_by_hand() -> None:
    """The target (0.9, 0.1): at even logits ln 2, with the gradient p - target."""
    assert loss_of(smoothed(0.2), [[0.0, 0.0]], [0]) == pytest.approx(log(2), abs=1e-12)
    assert gradient_of(smoothed(0.2), [[0.0, 0.0]], [0])[0] == pytest.approx([-0.4, 0.4], abs=1e-12)
    # Learnt to the end where the probabilities are the target's.
    assert gradient_of(smoothed(0.2), [[log(0.9), log(0.1)]], [0])[0] == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("amount", [0.1, 0.6])
def test_it_is_what_pytorch_has(amount: float) -> None:
    logits = drawn(6, 5)
    wanted = functional.cross_entropy(logits, torch.tensor(LABELS), label_smoothing=amount)
    found = total_of(smoothed(amount), logits, LABELS)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-14)
    assert torch.allclose(*(torch.autograd.grad(one, logits)[0] for one in (found, wanted)), atol=1e-15)


def test_reduces_to_cross_entropy_at_amount_zero(engine: Any, now: Now) -> None:
    assert gap(*(gradients(engine(objective=one), [rows_of_eight()], now) for one in (smoothed(0.0), "cross_entropy"))) == 0.0


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert_slopes("label_smoothing", LABELS)


def test_what_is_no_target_adds_nothing(engine: Any, now: Now) -> None:
    assert_idle(engine, now, "label_smoothing")


@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, tune: Any) -> None:
    assert_trains(engine, now, tune, "label_smoothing")


@pytest.mark.parametrize("amount", [-0.1, 1.0])
def test_options_out_of_range(amount: float) -> None:
    with pytest.raises(LuthierError, match="`amount` is") as caught:
        registry.part("label_smoothing", amount=amount)
    assert caught.value.where == "label_smoothing: amount"
