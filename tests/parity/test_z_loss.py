"""The z-loss: by hand, by finite differences, and nothing at weight 0."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest

from luthier.kinds import Now
from tests.objectives import TUNES, assert_idle, assert_slopes, assert_trains, gradient_of, loss_of
from tests.toys.helpers import gap, gradients, logits_of, model_of, rows_of_eight


def z_loss(weight: float) -> dict[str, Any]:
    return {"z_loss": {"weight": weight}}


def test_by_hand() -> None:
    """Z = 4 and Z = e^2 + 1: log(Z)^2, with the gradient 2 log(Z) p."""
    assert loss_of(z_loss(1.0), [[0.0] * 4, [2.0, 0.0, -1e9, -1e9]], [0, 1]) == pytest.approx(
        (log(4) ** 2 + log(exp(2) + 1) ** 2) / 2, abs=1e-12
    )
    assert gradient_of("z_loss", [[0.0] * 4], [0])[0] == pytest.approx([1e-4 * 2 * log(4) / 4] * 4, abs=1e-15)
    # Log-probabilities are left alone.
    assert loss_of(z_loss(1.0), [[log(0.3), log(0.7)]], [0]) == pytest.approx(0.0, abs=1e-20)


def test_it_stands_beside_cross_entropy() -> None:
    logits = [[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]]
    both = loss_of(["cross_entropy", z_loss(0.1)], logits, [0, 2])
    assert both == pytest.approx(loss_of("cross_entropy", logits, [0, 2]) + loss_of(z_loss(0.1), logits, [0, 2]), abs=1e-12)


def test_reduces_to_nothing_at_weight_zero(engine: Any, now: Now) -> None:
    both = ["cross_entropy", z_loss(0.0)]
    assert gap(*(gradients(engine(objective=one), [rows_of_eight()], now) for one in (both, "cross_entropy"))) == 0.0


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert_slopes(z_loss(1.0), [0, 3, 2, 2, 1, 4])


def test_log_z_is_logged_and_falls(engine: Any, now: Now) -> None:
    model, batch = model_of(), rows_of_eight()
    first = logits_of(model, batch)[:, :-1].logsumexp(-1)[batch.label_BT[:, 1:] >= 0].mean()
    run = engine(objective=["cross_entropy", z_loss(1.0)], model=model)
    logged = [run.step([batch], now._replace(step=i)).notes["log Z"] for i in range(5)]
    assert logged[0] == pytest.approx(first.item(), abs=1e-12) and logged[-1] < logged[0] - 0.1


def test_what_is_no_target_adds_nothing(engine: Any, now: Now) -> None:
    assert_idle(engine, now, ["cross_entropy", "z_loss"])


@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, tune: Any) -> None:
    assert_trains(engine, now, tune, ["cross_entropy", "z_loss"], "dft")
