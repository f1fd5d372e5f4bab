"""SM3 by hand, against Adagrad, and with entries that come and go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Now, Place, Refresh, Select, Selective, Services, State
from luthier.methods.optimizer._accumulators import accumulate, accumulate_entries, accumulators
from luthier.registry import make
from tests.conftest import split
from tests.toys.helpers import model_of, rows_of_eight, toys  # noqa: F401


def test_one_entry_by_hand() -> None:
    """Rows [4, 1], columns [9, 1], gradient 2 at (0, 0): min(4, 9) + 4 = 8; the row rises to it, the column is above it."""
    rows, columns = torch.tensor([[4.0], [1.0]]), torch.tensor([[9.0, 1.0]])
    assert (rows * columns).tolist() == [[36.0, 4.0], [9.0, 1.0]]
    bound = accumulate_entries(rows, columns, torch.tensor([0]), torch.tensor([2.0]))
    assert bound.tolist() == [8.0] and rows.tolist() == [[8.0], [1.0]] and columns.tolist() == [[9.0, 1.0]]
    assert float(2.0 / bound.sqrt()) == pytest.approx(0.7071, abs=1e-4)


def test_a_whole_matrix_by_hand() -> None:
    sums = accumulators((2, 2), torch.zeros(1))
    bound = accumulate(sums, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert bound.tolist() == [[1.0, 4.0], [9.0, 0.0]]
    assert sums[0].tolist() == [[4.0], [9.0]] and sums[1].tolist() == [[9.0, 4.0]]
    assert accumulate(sums, torch.ones(2, 2)).tolist() == [[5.0, 5.0], [10.0, 5.0]]
    assert sums[0].tolist() == [[5.0], [10.0]] and sums[1].tolist() == [[10.0, 5.0]]


def test_all_entries_scattered_are_the_whole_matrix() -> None:
    rng = torch.Generator().manual_seed(0)
    whole, scattered = (accumulators((3, 5), torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    index = torch.randperm(15, generator=rng)
    for _ in range(4):
        gradient = torch.randn(3, 5, generator=rng, dtype=torch.float64)
        bound = accumulate(whole, gradient).flatten()[index]
        assert torch.equal(accumulate_entries(scattered[0], scattered[1], index, gradient.flatten()[index]), bound)
        assert torch.equal(whole[0], scattered[0]) and torch.equal(whole[1], scattered[1])


def go(run: Any, now: Now, steps: int) -> None:
    for i in range(steps):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))


def test_the_bound_is_never_below_adagrads_sum_and_costs_a_row_and_a_column(engine: Any, now: Now) -> None:
    run = engine({"full": {"target_modules": ["mlp_up"]}}, model=model_of(layers=1), optimizer="sm3")
    ((name, one),) = run.tune.trained.items()
    exact, start = torch.zeros_like(one.master.detach()), one.master.detach().clone()
    for i in range(5):
        rng = torch.Generator().manual_seed(i)
        one.gradient = torch.randn(one.master.shape, generator=rng, dtype=torch.float64)
        exact += one.gradient.square()
        run.chain.step(now._replace(step=i))
    state = run.chain.state["sm3"][name]
    assert (torch.minimum(state["sums 0"], state["sums 1"]) >= exact - 1e-12).all()
    assert sum(value.numel() for value in run.chain.tensors().values()) == sum(one.master.shape)
    assert not torch.equal(one.master.detach(), start)


def test_vectors_are_pytorchs_adagrad(engine: Any, now: Now) -> None:
    run = engine({"full": {"target_modules": ["norm"]}}, model=model_of(), optimizer="sm3")
    copies = {name: one.master.detach().clone().requires_grad_(True) for name, one in run.tune.trained.items()}
    torchs = torch.optim.Adagrad(list(copies.values()), lr=0.1, eps=0.0)
    for i in range(5):
        for k, (name, one) in enumerate(run.tune.trained.items()):
            rng = torch.Generator().manual_seed(10 * i + k)
            one.gradient = torch.randn(one.master.shape, generator=rng, dtype=torch.float64)
            copies[name].grad = one.gradient.clone()
        torchs.step()
        run.chain.step(now._replace(step=i))
    for name, one in run.tune.trained.items():
        assert torch.allclose(one.master.detach(), copies[name].detach(), rtol=0, atol=1e-14)


def test_a_number_alone_is_adagrads(now: Now) -> None:
    """Gradients of 2: 3 - 0.1 * 2 / sqrt(4), and then less 0.1 * 2 / sqrt(8)."""
    one: Any = SimpleNamespace(form="free", index=None, rate=1.0, decay=False)
    value, optimizer = torch.tensor(3.0, dtype=torch.float64), make({"sm3": {}}, ("optimizer",)).values[0]
    state: State = {}
    for wanted in (2.9, 2.9 - 0.1 / 2**0.5):
        optimizer.step(value, torch.tensor(2.0, dtype=torch.float64), state, one, now._replace(learning_rate=0.1))
        assert value.item() == pytest.approx(wanted, abs=1e-14)


def test_momentum_and_decay_by_hand(engine: Any, now: Now) -> None:
    run = engine({"some_cols": {"rate": 0.5}}, model=model_of(), optimizer={"sm3": {"momentum": 0.9, "weight_decay": 0.1}})
    one = next(iter(run.tune.trained.values()))
    value = one.master.detach().clone()
    direction = torch.zeros_like(value)
    for i in range(3):
        one.gradient = torch.full_like(value, 2.0)
        run.chain.step(now._replace(step=i, learning_rate=0.2))
        # Equal gradients: the bound is exact, the sum of their squares.
        direction = 0.9 * direction + 0.1 * (i + 1) ** -0.5
        value = value * (1 - 0.1 * 0.1) - 0.1 * direction
        assert torch.allclose(one.master.detach(), value, rtol=0, atol=1e-14)


def test_decay_pulls_to_the_anchor_and_no_gradient_moves_nothing(now: Now) -> None:
    """A tenth of the way to the anchor, which is 4, then 3.6; only the second number has gradients, of 2."""
    anchor = torch.tensor([7.0, 3.0, 5.0], dtype=torch.float64)
    one: Any = SimpleNamespace(form="free", index=None, rate=0.5, decay=True, anchor=anchor)
    value, optimizer = anchor - torch.tensor([4.0, 0.0, 0.0]), make({"sm3": {"weight_decay": 1.0}}, ("optimizer",)).values[0]
    state: State = {}
    for wanted in ([3.4, 2.9, 5.0], [3.76, 2.91 - 0.1 / 2**0.5, 5.0]):
        optimizer.step(value, torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64), state, one, now._replace(learning_rate=0.2))
        assert torch.allclose(value, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_accumulators_of_rows_and_columns_stay_when_entries_come_and_go(engine: Any, now: Now, architecture: str) -> None:
    """All entries leave for others: the optimizer still knows the rows and columns, and nothing of single entries."""
    found: dict[str, Tensor] = {}

    def choose(parts: Any, services: Services) -> dict[Place, Select]:
        return {place: Select("flat", torch.tensor([0, 1, 40])) for place in parts.select(target_modules=["mlp_down"], blocks=[0])}

    def refresh(state: Any, services: Services) -> dict[Place, Refresh]:
        place = next(one.place for one in services.trained() if one.place is not None)
        return {place: Refresh(torch.tensor([2, 41, 42]), torch.full((3,), -1))} if services.now.step == 2 else {}

    run = engine(Selective(choose, refresh=refresh), model=model_of(architecture), optimizer="sm3")
    ((name, one),) = run.tune.trained.items()
    width = run.tune.region(one.place).shape[1]
    go(run, now, 2)
    found = {key: value.clone() for key, value in run.chain.state["sm3"][name].items()}
    assert found["sums 0"].shape == (run.tune.region(one.place).shape[0], 1) and found["sums 1"].shape == (1, width)
    go(run, now, 3)
    kept = run.chain.state["sm3"][name]
    assert all((kept[key] >= value).all() for key, value in found.items())
    touched = (0, 1, 40)
    assert set(kept["sums 1"].flatten().nonzero().flatten().tolist()) == {i % width for i in touched}
    assert set(kept["sums 0"].flatten().nonzero().flatten().tolist()) == {i // width for i in touched}
    run.step([rows_of_eight()], now._replace(step=3))
    assert set(kept["sums 1"].flatten().nonzero().flatten().tolist()) == {i % width for i in (0, 1, 40, 2, 41, 42)}


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"weight_decay": -0.1}, {"epsilon": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(LuthierError, match=next(iter(options)).replace("_", " ")):
        make({"sm3": options}, ("optimizer",))
