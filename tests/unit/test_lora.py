"""LoRA: how its factors start, which ranks it takes, and when it draws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.kinds import Place
from luthier.methods.weight_delta.lora import lora

PLACE = Place("hand", "weight", "mlp_up", 0)
SERVICES: Any = SimpleNamespace(rng=lambda key: torch.Generator().manual_seed(len(key)))


def test_one_factor_starts_even_and_the_other_at_zero() -> None:
    """Evenly within one over the root of the width that is read; the variance of what is even is a third, that of its square 4 / 45."""
    tensors = lora(rank=24).start(PLACE, torch.zeros(40, 100), SERVICES)
    assert tensors["up"].shape == (40, 24) and not tensors["up"].any()
    even = tensors["down"].double().flatten() * 10
    assert tensors["down"].shape == (24, 100) and float(even.abs().max()) <= 1 + 1e-6
    assert abs(float(even.mean())) < 4 * (3 * len(even)) ** -0.5
    assert float(even.square().mean()) == pytest.approx(1 / 3, abs=4 * (4 / 45 / len(even)) ** 0.5)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_rank_is_at_most_the_larger_width(shape: tuple[int, int]) -> None:
    for rank in (1, 5):
        assert lora(rank=rank).start(PLACE, torch.zeros(shape), SERVICES)["down"].shape == (rank, shape[1])
    with pytest.raises(LuthierError, match=f"a rank of 6 is no low rank of a {shape[0]} x {shape[1]} matrix"):
        lora(rank=6).start(PLACE, torch.zeros(shape), SERVICES)
    with pytest.raises(LuthierError, match="the rank is 0"):
        lora(rank=0)


def test_it_draws_where_it_drops() -> None:
    assert [lora(dropout=dropout).draws for dropout in (0.0, 0.01, 0.9)] == [False, True, True]
    for dropout in (-0.1, 1.0):
        with pytest.raises(LuthierError, match=f"the dropout is {dropout}"):
            lora(dropout=dropout)
