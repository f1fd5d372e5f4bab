"""AdamW by hand: its steps with one age and with ages of entries, what decay pulls to, and moments that are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kinds import Now, Seen
from luthier.methods.optimizer.adamw import adamw

DOUBLE = torch.float64


def trained(master: Tensor, **facts: Any) -> Any:
    """What the optimizer sees of a tensor."""
    return SimpleNamespace(**{"master": master, "changes": False, "axis": 0, "rate": 0.5, "decay": True, "anchor": None, **facts})


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("changes", [True, False])
def test_three_steps_by_the_formula(changes: bool, decays: bool, anchored: bool) -> None:
    """Decay takes rate * decay of the way to the anchor, or to zero, before the step that ignores it."""
    rng = torch.Generator().manual_seed(0)
    value, anchor, *gradients = (torch.randn(3, 2, generator=rng, dtype=DOUBLE) for _ in range(5))
    one = trained(value, changes=changes, decay=decays, anchor=anchor if anchored else None)
    optimizer = adamw(weight_decay=0.3, beta1=0.6, beta2=0.7, epsilon=0.01)
    state = optimizer.init(one)
    wanted, first, second = value.clone(), torch.zeros(3, 2), torch.zeros(3, 2)
    for age, gradient in enumerate(gradients, 1):
        optimizer.step(value, gradient.clone(), state, one, Now(learning_rate=0.2))
        first, second = 0.6 * first + 0.4 * gradient, 0.7 * second + 0.3 * gradient.square()
        if decays:
            wanted = wanted + 0.1 * 0.3 * ((anchor if anchored else 0.0) - wanted)
        wanted = wanted - 0.1 * (first / (1 - 0.6**age)) / ((second / (1 - 0.7**age)).sqrt() + 0.01)
        assert torch.allclose(value, wanted, rtol=0, atol=1e-12)
    assert torch.equal(state["age"], torch.full((3, 1) if changes else (), 3.0))


@pytest.mark.parametrize(("shape", "axis"), [((3,), 0), ((3, 2), 0), ((2, 3), 1), ((3, 1), 0), ((1, 3), 1)])
def test_newcomers_have_the_age_and_the_moments_of_what_was_seen(shape: tuple[int, ...], axis: int) -> None:
    """Entries come and go along one axis: the second of three is new, with a mean of 2 and a mean square of 5 over four steps."""
    one = trained(torch.zeros(shape, dtype=DOUBLE), changes=True, axis=axis)
    optimizer = adamw(beta1=0.5, beta2=0.75)
    state = optimizer.init(one)
    for _ in range(2):
        optimizer.step(torch.zeros(shape, dtype=DOUBLE), torch.ones(shape, dtype=DOUBLE), state, one, Now())
    is_new = torch.zeros(shape, dtype=torch.bool)
    is_new.select(axis, 1).fill_(True)
    assert optimizer.seed is not None
    optimizer.seed(state, is_new, Seen(torch.full(shape, 2.0, dtype=DOUBLE), torch.full(shape, 5.0, dtype=DOUBLE), 4))
    for name, stayed, came in (("first", 1 - 0.5**2, 2 * (1 - 0.5**4)), ("second", 1 - 0.75**2, 5 * (1 - 0.75**4))):
        wanted = torch.full(shape, stayed, dtype=DOUBLE).masked_fill(is_new, came)
        assert torch.allclose(state[name], wanted, rtol=0, atol=1e-12)
    lengths = [3 if i == axis else 1 for i in range(len(shape))]
    assert torch.equal(state["age"], torch.tensor([2.0, 4.0, 2.0]).reshape(lengths))
