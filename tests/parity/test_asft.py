"""Anchored SFT: the family of four losses it ends, and the card's numbers by hand."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.columns.chunked import resolve
from luthier.kinds import LossTerm, Now, TokenWeight
from luthier.training.services import view_of
from tests.objectives import TUNES, assert_idle, assert_trains, differences, drawn, gradient_of, loss_of, total_of
from tests.toys.helpers import gap, gradients, rows_of_eight

EVEN = torch.zeros(1, 2, dtype=torch.float64)
LABELS = [0, 3, 2, 2]


def asft(anchor: float, direction: str = "forward") -> dict[str, Any]:
    return {"asft": {"anchor": anchor, "direction": direction}}


def test_it_is_three_parts() -> None:
    values = registry.part("asft").values
    assert [type(value) for value in values] == [LossTerm, TokenWeight, LossTerm]
    assert [value.weight for value in values if isinstance(value, LossTerm)] == [1.0, 0.05]


def test_two_words_by_hand() -> None:
    """The base is even, the model has logits 1 and 0."""
    found = loss_of(asft(0.05), [[1.0, 0.0]], [0], others={"base": EVEN})
    assert found == pytest.approx(0.23502, abs=1e-5)
    slope = gradient_of(asft(0.05), [[1.0, 0.0]], [0], others={"base": EVEN})[0]
    assert slope == pytest.approx([-0.18506, 0.18506], abs=1e-5)
    p = 0.7310585786300049
    reverse = p * log(p / 0.5) + (1 - p) * log((1 - p) / 0.5)
    found = loss_of(asft(0.05, "reverse"), [[1.0, 0.0]], [0], others={"base": EVEN})
    assert found == pytest.approx(-p * log(p) + 0.05 * reverse, abs=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_four_of_the_family(direction: str) -> None:
    """The gradient is that of minus the probability, plus the anchor's; without the weight, that of cross-entropy plus it."""
    logits, base = drawn(4, 5), drawn(4, 5, seed=9).detach()

    def anchor(logits: Tensor) -> Tensor:
        own, other = logits.log_softmax(-1), base.log_softmax(-1)
        first, second = (other, own) if direction == "forward" else (own, other)
        return 0.3 * (first.exp() * (first - second)).sum(-1).mean()

    def likely(logits: Tensor) -> Tensor:
        return logits.softmax(-1)[torch.arange(4), torch.tensor(LABELS)]

    kl = {"kl": {"weight": 0.3, "direction": direction}}
    cases: list[tuple[Any, str | None, Callable[[Tensor], Tensor]]] = [
        ("cross_entropy", None, lambda one: -likely(one).log().mean()),
        ("cross_entropy", "dft", lambda one: -likely(one).mean()),
        (["cross_entropy", kl], None, lambda one: -likely(one).log().mean() + anchor(one)),
        (asft(0.3, direction), None, lambda one: -likely(one).mean() + anchor(one)),
    ]
    for objective, weight, wanted in cases:
        loss = total_of(objective, logits, LABELS, weight=weight, others={"base": base})
        (found,) = torch.autograd.grad(loss, logits)
        (slopes,) = torch.autograd.grad(wanted(logits), logits)
        assert torch.allclose(found, slopes, atol=1e-14)
        assert torch.allclose(found, differences(wanted, logits), atol=1e-9)


def test_reduces_to_dft_at_anchor_zero(engine: Any, now: Now) -> None:
    runs = [engine(objective=asft(0.0)), engine(token_weight="dft")]
    assert gap(*(gradients(run, [rows_of_eight()], now) for run in runs)) == 0.0


def test_the_anchor_pulls_once_the_model_has_moved(engine: Any, now: Now) -> None:
    """At the first step it is zero to the last bits; later the model stays nearer to the base than with dft alone."""
    batch = rows_of_eight()
    runs = [engine(objective=asft(2.0)), engine(token_weight="dft", keep_base=True)]
    assert gap(*(gradients(run, [batch], now) for run in runs)) < 1e-12
    for run in runs:
        for step in range(10):
            run.step([batch], now._replace(step=step, learning_rate=0.002))
    anchored, alone = (view_of(run.tune, batch, resolve(["kl_forward"]), now)["kl_forward"].mean().item() for run in runs)
    assert 0.0 < anchored < 0.8 * alone


def test_what_is_no_target_adds_nothing(engine: Any, now: Now) -> None:
    assert_idle(engine, now, "asft")


@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_it_goes_with_every_kind_of_tune(engine: Any, now: Now, tune: Any) -> None:
    assert_trains(engine, now, tune, "asft")
