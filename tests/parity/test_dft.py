"""Dynamic Fine-Tuning: the card's numbers by hand, the gradient of the probability, and what it becomes at power 0."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch

from luthier.kinds import Now
from tests.objectives import differences, gradient_of, loss_of
from tests.toys.helpers import gap, gradients, rows_of_eight


def test_two_words_by_hand() -> None:
    """p = 0.5: the loss is p * ln 2, its gradient p * (p - 1); at p = 0.1192 a weight with a gradient would turn the sign."""
    assert loss_of("cross_entropy", [[0.0, 0.0]], [0], weight="dft") == pytest.approx(0.5 * log(2), abs=1e-6)
    assert gradient_of("cross_entropy", [[0.0, 0.0]], [0], weight="dft")[0] == pytest.approx([-0.25, 0.25], abs=1e-6)
    assert gradient_of("cross_entropy", [[0.0, 2.0]], [0], weight="dft")[0] == pytest.approx([-0.10499, 0.10499], abs=1e-5)


def test_the_gradient_is_that_of_the_probability() -> None:
    logits = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = [i % 7 for i in range(9)]
    wanted = differences(lambda one: -one.softmax(-1)[torch.arange(9), torch.tensor(labels)].mean(), logits)
    found = gradient_of("cross_entropy", logits.tolist(), labels, weight="dft")
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), wanted, atol=1e-10)


def test_reduces_to_cross_entropy_at_power_zero(engine: Any, now: Now) -> None:
    plain, none = (gradients(engine(token_weight=weight), [rows_of_eight()], now) for weight in (None, {"dft": {"power": 0.0}}))
    assert gap(none, plain) == 0.0


def test_what_is_logged_beside_the_loss(engine: Any, now: Now) -> None:
    """Plain cross-entropy, effective number of targets, entropy and the share that is kept."""
    plain, weighted = engine().step([rows_of_eight()], now), engine(token_weight="dft").step([rows_of_eight()], now)
    assert plain.weights is None and weighted.nll == pytest.approx(plain.nll, rel=1e-6)
    assert weighted.loss <= exp(-1)
    assert weighted.weights is not None and weighted.weights.weighted_share == 1.0
    assert 0 < weighted.weights.effective_labels < rows_of_eight().supervised
    assert 0 < weighted.weights.entropy < log(256) + 1e-6
