"""Narrow weights: sums in fp32 masters, or no masters and rounding that is right on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.kinds import Now
from luthier.training.chain import round_stochastically
from luthier.training.engine import Work
from tests.conftest import make_batch, split
from tests.toys.helpers import model_of, rows_of_eight, toys  # noqa: F401


@pytest.mark.parametrize("tune", ["full", "some_rows"])
def test_64_micro_batches_are_summed_in_fp32(engine: Any, now: Now, tune: str) -> None:
    run = engine(tune, model=model_of(), dtype=torch.bfloat16)
    batches = split(make_batch([(6, 4)] * 64), [1] * 64)
    units = run.objective.units(batches, None, run.world)
    sums = {name: torch.zeros_like(one.master, dtype=torch.float64) for name, one in run.tune.trained.items()}
    narrow = {name: torch.zeros_like(one.master, dtype=torch.bfloat16) for name, one in run.tune.trained.items()}
    for batch in batches:
        Work(run, batches, now, units, None).backward(batch)
        for name, one in run.tune.trained.items():
            sums[name] += one.gradient.double()
            narrow[name] += one.gradient.bfloat16()
        run.tune.free_gradients()
    work = Work(run, batches, now, units, None)
    for batch in batches:
        work.backward(batch)
    for name, one in run.tune.trained.items():
        assert one.gradient.dtype == torch.float32
        size = sums[name].norm()
        assert float((one.gradient - sums[name]).norm() / size) < 1e-5
        assert float((narrow[name] - sums[name]).norm() / size) > 1e-3
        assert one.leaf.grad is None


@pytest.mark.parametrize("tune", ["full", "half", "some_rows", "some_cols"])
def test_masters_are_fp32_and_live_weights_are_their_rounding(engine: Any, now: Now, tune: str) -> None:
    run = engine(tune, model=model_of(), dtype=torch.bfloat16, optimizer="adamw")
    for i in range(3):
        run.step([rows_of_eight()], now._replace(step=i, learning_rate=1e-4))
    for one in run.tune.trained.values():
        assert one.master.dtype == torch.float32
        region = run.tune.region(one.place)
        live = region if one.form == "whole" else region[one.index] if one.form == "rows" else region[:, one.index]
        assert live.dtype == torch.bfloat16 and torch.equal(live, one.master.detach().bfloat16())
    assert any(not torch.equal(one.master, one.master.bfloat16().float()) for one in run.tune.trained.values())


@pytest.mark.parametrize("tune", ["full", "some_rows"])
def test_without_masters_no_fp32_copy_of_a_weight_exists(engine: Any, now: Now, tune: str) -> None:
    run = engine(tune, model=model_of(), dtype=torch.bfloat16, optimizer="adamw", masters="none")
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    for i in range(2):
        run.step(split(rows_of_eight(), (5, 3)), now._replace(step=i, learning_rate=1e-3))
    for name, one in run.tune.trained.items():
        assert one.master.dtype == one.leaf.dtype == torch.bfloat16
        assert not torch.equal(one.master, before[name])
        if one.form == "whole":
            assert one.master.data_ptr() == run.tune.model.get_parameter(one.place.parameter).data_ptr()
        else:
            assert torch.equal(run.tune.region(one.place)[one.index], one.master)
    assert all(state["first"].dtype == torch.float32 for state in run.chain.state["adamw"].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tune", ["full", "some_rows"])
def test_what_is_held_is_what_optimizers_hold(engine: Any, tune: str, architecture: str, dtype: torch.dtype) -> None:
    """In bf16 the weights themselves would not know of so small a step."""
    run = engine({tune: {"target_modules": ["mlp_down"]}}, model=model_of(architecture, layers=1), dtype=dtype).tune
    one = next(one for name, one in run.trained.items() if name.endswith("weight"))
    expected_OI = run.region(one.place).to(one.master.dtype, copy=True)
    expected_OI[slice(None) if one.form == "whole" else one.index] += 1e-4
    run.set({one.name: one.master + 1e-4})
    held_OI = run.held(one.place)
    assert held_OI.dtype == one.master.dtype and torch.equal(held_OI, expected_OI)
    assert torch.equal(run.region(one.place), expected_OI) == (dtype == torch.float64)
    copied = run.widened(one.place.parameter)
    assert not copied.requires_grad and torch.equal(copied.t() if architecture == "gpt2" else copied, expected_OI)
    copied.zero_()
    assert torch.equal(run.held(one.place), expected_OI)


def test_stochastic_rounding_is_right_on_average_and_goes_to_a_neighbor() -> None:
    value = torch.tensor([1.001, -1.001, 3.1415926, 1e-6, -0.3333, 1.0, 0.0])
    rng = torch.Generator().manual_seed(0)
    rounded = torch.stack([round_stochastically(value, torch.bfloat16, rng) for _ in range(4000)]).double()
    step = 2.0 ** (value.abs().clamp(min=1e-30).log2().floor() - 7).double()
    assert ((rounded - value.double()).abs() < step).all()
    # Five standard errors of a draw between two neighbors.
    assert ((rounded.mean(0) - value.double()).abs() <= 5 * 0.5 * step / 4000**0.5).all()
    assert (rounded[:, 5:] == value[5:]).all()
    assert all(len(rounded[:, i].unique()) == 2 for i in range(5))


def test_rounding_leaves_other_types_alone() -> None:
    value, rng = torch.tensor([1.001]), torch.Generator().manual_seed(0)
    assert torch.equal(round_stochastically(value, torch.float32, rng), value)
    assert round_stochastically(value.double(), torch.bfloat16, rng).dtype == torch.bfloat16


def test_updates_too_small_for_bf16_still_add_up_without_masters(engine: Any, now: Now) -> None:
    run = engine({"full": {"target_modules": ["mlp_down"]}}, model=model_of(), dtype=torch.bfloat16, masters="none")
    run.tune.set({name: torch.ones_like(one.master) for name, one in run.tune.trained.items()})
    for i in range(40):
        for one in run.tune.trained.values():
            one.gradient = torch.ones(one.master.shape)
        # A tenth of the distance of 1 to the bf16 number below: rounding to the nearest would never move.
        run.chain.step(now._replace(step=i, learning_rate=2**-8 / 10))
    moved = [1 - one.master.detach().double().mean() for one in run.tune.trained.values()]
    assert all(abs(float(one) / (4 * 2**-8) - 1) < 0.02 for one in moved)


def test_rounding_is_the_same_for_the_same_seed_and_step(engine: Any, now: Now) -> None:
    found = []
    for seed in (0, 0, 1):
        run = engine(model=model_of(), dtype=torch.bfloat16, masters="none", optimizer="adamw")
        run.step([rows_of_eight()], now._replace(learning_rate=1e-4, seed=seed))
        found.append(torch.cat([one.master.detach().flatten() for one in run.tune.trained.values()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
