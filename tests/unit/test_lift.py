"""LIFT against the paper's rule: which entries train, when they change, and what becomes of their moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.selective._entries import largest
from luthier.methods.selective.lift import low_rank, randomized_low_rank
from luthier.training.checkpoint import restore, save
from tests.conftest import split
from tests.toys.helpers import gradients, model_of, plain_gradients, rows_of_eight
from tests.unit.selective_oracles import dense_of, live, selected, untouched
from tests.unit.test_kinds_resume import assert_equal, build, everything, go

SMALL = {"rank": 4, "lora_rank": 2}


def lift(**options: Any) -> dict[str, Any]:
    return {"lift": {**SMALL, **options}}


def steps(run: Any, now: Now, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))


def brute_force(weight_OI: Tensor, rank: int, count: int) -> list[int]:
    """The rule as the paper writes it, term by term."""
    left, size, right = torch.linalg.svd(weight_OI.double())
    approximation = torch.zeros(weight_OI.shape, dtype=torch.float64)
    for r in range(min(rank, len(size))):
        approximation += size[r] * torch.outer(left[:, r], right[r])
    size_of = approximation.abs().flatten().tolist()
    return sorted(sorted(range(len(size_of)), key=lambda i: -size_of[i])[:count])


def test_the_approximation_by_hand() -> None:
    diagonal = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert torch.allclose(low_rank(diagonal, 1), torch.diag(torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)))
    assert largest(low_rank(diagonal, 1).abs(), 1).tolist() == [0]
    found = low_rank(torch.tensor([[1.0, 1.0], [1.0, 1.1]], dtype=torch.float64), 1)
    wanted = torch.tensor([[0.97441, 1.02434], [1.02434, 1.07684]], dtype=torch.float64)
    assert float((found - wanted).abs().max()) < 1e-5


def test_neither_magnitude_nor_smallest() -> None:
    weight = torch.tensor([[3.0, 3.0, 0.0], [3.0, 3.0, 0.0], [0.0, 0.0, 4.0]])
    assert largest(low_rank(weight, 1).abs(), 4).tolist() == [0, 1, 3, 4]
    assert 8 in largest(weight.abs(), 4).tolist()
    assert not set(largest(-low_rank(weight, 1).abs(), 4).tolist()) & {0, 1, 3, 4}


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (12, 12)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_selection_is_that_of_brute_force(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    found = selected({"lift": {"rank": rank, "lora_rank": 2}}, weight)
    assert found.form == "flat" and found.index is not None
    assert found.index.tolist() == brute_force(weight, rank, 2 * sum(shape))


def test_a_rank_that_covers_the_weight_leaves_plain_magnitude() -> None:
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_magnitude = weight.abs().flatten().argsort(descending=True)[:16].sort().values
    for rank in (7, 100):
        assert torch.equal(selected({"lift": {"rank": rank, "lora_rank": 1}}, weight).index, by_magnitude)
    assert not torch.equal(selected({"lift": {"rank": 2, "lora_rank": 1}}, weight).index, by_magnitude)


def test_a_randomized_decomposition_selects_nearly_the_same() -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(80, 60, generator=rng, dtype=torch.float64)).Q for _ in range(2))
    # The spectrum of trained weights falls slowly: like a power.
    weight = left * torch.arange(1, 61, dtype=torch.float64) ** -0.7 @ right.t()
    exact = low_rank(weight, 8)
    near = randomized_low_rank(weight, 8, torch.Generator().manual_seed(1))
    assert torch.equal(near, randomized_low_rank(weight, 8, torch.Generator().manual_seed(1), rounds=8))
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.005
    both = set(largest(exact.abs(), 320).tolist()) & set(largest(near.abs(), 320).tolist())
    assert len(both) > 0.99 * 320
    # A weight of low rank is found exactly.
    assert float((randomized_low_rank(exact, 8, rng) - exact).abs().max()) < 1e-12


def test_the_range_is_that_of_twice_as_many_random_inputs_as_the_rank() -> None:
    """Without power iterations: the closest matrix of rank 2 to what 4 random inputs can tell of the weight."""
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output_OP = weight @ torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = low_rank(output_OP @ torch.linalg.pinv(output_OP) @ weight, 2)
    found = randomized_low_rank(weight, 2, torch.Generator().manual_seed(1), rounds=0)
    assert float((found - wanted).abs().max()) < 1e-12 and float((found - low_rank(weight, 2)).abs().max()) > 0.01


def test_little_of_the_weight_moves_it_in_many_directions() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 32, generator=rng, dtype=torch.float64)
    found = []
    for rank in (1, 4, 8):
        change = torch.zeros(32 * 32, dtype=torch.float64)
        index = selected({"lift": {"rank": rank, "lora_rank": 2}}, weight).index
        change[index] = torch.randn(len(index), generator=rng, dtype=torch.float64)
        assert len(index) == 128
        found.append(int(torch.linalg.matrix_rank(change.reshape(32, 32))))
    # A LoRA with as many numbers has rank 2.
    assert found == sorted(found) and found[0] > 8 and found[-1] > 18


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_every_linear_map_trains_its_own_share_and_nothing_else(engine: Any, now: Now, architecture: str) -> None:
    model = model_of(architecture).float()
    base = live(model)
    run = engine(lift(), model=model, optimizer="adamw", dtype=torch.float32)
    assert {one.place for one in run.tune.trained.values()} == set(run.tune.parts.select(target_modules=("linear",)))
    for one in run.tune.trained.values():
        region = run.tune.region(one.place)
        assert one.form == "flat" and len(one.index) == 2 * sum(region.shape) < region.numel()
    steps(run, now, 3)
    assert untouched(run, base)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_are_those_of_full_fine_tuning_at_the_selection(engine: Any, now: Now, architecture: str) -> None:
    model, batch = model_of(architecture), rows_of_eight()
    wanted = plain_gradients(model, batch)
    run = engine(lift(), model=model)
    found = gradients(run, [batch], now)
    for name, one in run.tune.trained.items():
        assert float((found[name] - dense_of(run, one, wanted).flatten()[one.index]).abs().max()) < 1e-12


def test_a_budget_that_covers_every_weight_is_full_fine_tuning(engine: Any, now: Now) -> None:
    found = []
    for tune in ({"lift": {"rank": 4, "lora_rank": 100, "every": 2}}, {"full": {"target_modules": ["linear"]}}):
        model = model_of()
        run = engine(tune, model=model, optimizer={"adamw": {"weight_decay": 0.1}})
        steps(run, now, 5)
        found.append(live(model))
    assert max(float((value - found[1][name]).abs().max()) for name, value in found[0].items()) < 1e-12


def test_the_selection_changes_after_every_so_many_steps(engine: Any, now: Now) -> None:
    model = model_of()
    run = engine(lift(every=2), model=model, optimizer="adamw")
    now = now._replace(steps=8)
    for i in range(8):
        before = {name: (one.index, one.master.detach().clone()) for name, one in run.tune.trained.items()}
        steps(run, now, 1, first=i)
        new = i % 2 == 1 and i < 7
        for name, one in run.tune.trained.items():
            values = run.tune.region(one.place)
            if not new:
                assert torch.equal(one.index, before[name][0])
                continue
            assert one.index.tolist() == brute_force(values, 4, len(one.index))
            # What trains stands in the weight, and what left kept what it learnt.
            assert torch.equal(values.flatten()[one.index], one.master.detach())
            left = ~torch.isin(before[name][0], one.index)
            changed = values.flatten()[before[name][0]] != before[name][1]
            assert bool(changed[left].all())
        if i == 1:
            assert any(not torch.equal(one.index, before[name][0]) for name, one in run.tune.trained.items())


def spread(state: dict[str, Any], key: str, index: Tensor, numel: int) -> Tensor:
    return torch.zeros(numel, dtype=state[key].dtype).index_put((index,), state[key])


def test_entries_of_a_model_in_bf16_are_ranked_as_their_masters_hold_them(engine: Any, now: Now) -> None:
    """Later selections ranked the live weights in bf16, in which what was learnt since is rounded away."""
    run = engine(
        {"lift": {"rank": 32, "lora_rank": 1, "every": 1, "target_modules": ["mlp_down"]}},
        model=model_of(layers=1),
        dtype=torch.bfloat16,
    )
    ((name, one),) = run.tune.trained.items()
    learnt = one.master.detach() * (1 + 2**-11)
    run.tune.set({name: learnt})
    weight = run.services("lift", now).weight(one.place)
    assert weight.dtype == torch.float32 and torch.equal(weight.flatten()[one.index], learnt)
    live = run.tune.region(one.place).flatten().float()
    others = torch.ones_like(live, dtype=torch.bool)
    others[one.index] = False
    assert torch.equal(weight.flatten()[others], live[others])


def test_moments_of_entries_that_stay_are_kept_and_others_start_at_zero(engine: Any, now: Now) -> None:
    run = engine(lift(every=2), model=model_of(), optimizer="adamw")
    state = run.chain.state["adamw"]
    sizes = {name: run.tune.region(one.place).numel() for name, one in run.tune.trained.items()}
    ever = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
    joined_again = 0
    for i in range(1, 13, 2):
        steps(run, now, 1, first=i - 1)
        # As the last step, so that no selection follows: it is made below, apart.
        steps(run, now._replace(steps=i + 1), 1, first=i)
        old = {name: one.index for name, one in run.tune.trained.items()}
        kept = {
            (name, key): spread(state[name], key, index, sizes[name])
            for name, index in old.items()
            for key in ("first", "second", "age")
        }
        run.tune.refresh(lambda slot, i=i: run.services(slot, now._replace(step=i)), now._replace(step=i))
        for name, one in run.tune.trained.items():
            for key in ("first", "second", "age"):
                assert torch.equal(state[name][key], kept[name, key][one.index])
            new = ~torch.isin(one.index, old[name])
            assert not state[name]["age"][new].any() and bool((state[name]["age"][~new] > 0).all())
            ever[name][old[name]] = True
            joined_again += int(ever[name][one.index[new]].sum())
    assert joined_again, "no entry left and came back: the test does not reach it"


def test_an_entry_that_joins_late_steps_like_a_new_one(engine: Any) -> None:
    """At a constant gradient AdamW moves by the learning rate in every step, however old the run is."""
    run = engine(lift(every=2), model=model_of(), optimizer={"adamw": {"epsilon": 1e-30}})
    now = Now(steps=20, learning_rate=0.05)
    for i in range(6):
        before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
        for one in run.tune.trained.values():
            one.gradient = torch.full_like(one.master.detach(), 0.3)
        run.chain.step(now)
        for name, one in run.tune.trained.items():
            assert torch.allclose(before[name] - one.master.detach(), torch.full_like(before[name], 0.05), atol=1e-12)
        run.tune.refresh(lambda slot, i=i: run.services(slot, now._replace(step=i)), now._replace(step=i))
    ages = torch.cat([state["age"] for state in run.chain.state["adamw"].values()])
    assert set(ages.tolist()) > {0.0, 6.0}


def test_adamw_holds_two_numbers_and_an_age_for_each_entry(engine: Any, now: Now) -> None:
    run = engine(lift(every=2), model=model_of(), optimizer="adamw")
    steps(run, now, 5)
    held = sum(value.numel() for value in run.chain.tensors().values())
    assert held == 3 * run.tune.numbers() < sum(one.numel() for one in run.tune.model.parameters())


def test_clipping_sees_the_selected_entries_alone(engine: Any, now: Now) -> None:
    batch = rows_of_eight()
    model = model_of()
    run = engine(lift(), model=model)
    norm = float(torch.cat([g.flatten() for g in gradients(run, [batch], now).values()]).norm())
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    run = engine(lift(), model=model_of(), optimizer=[{"clip": {"norm": norm / 2}}, "sgd"])
    run.step([batch], now._replace(learning_rate=1.0))
    moved = torch.cat([before[name] - one.master.detach() for name, one in run.tune.trained.items()])
    assert abs(float(moved.norm()) - norm / 2) < 1e-6


def test_small_steps_of_large_entries_survive_bf16(engine: Any) -> None:
    """A step of 1e-4 is less than half of what bf16 can tell from 0.5; a hundred of them are not."""
    run = engine(lift(), model=model_of(), dtype=torch.bfloat16)
    one = next(iter(run.tune.trained.values()))
    run.tune.set({one.name: torch.full_like(one.master.detach(), 0.5)})
    for _ in range(100):
        one.gradient = torch.full_like(one.master.detach(), -1e-4)
        run.chain.step(Now(learning_rate=1.0), only=one)
    assert float((one.master.detach() - 0.51).abs().max()) < 1e-5
    assert float((run.tune.region(one.place).flatten()[one.index].float() - 0.51).abs().max()) < 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_27_resuming_between_and_at_selections(engine: Any, now: Now, tmp_path: Path, dtype: torch.dtype) -> None:
    """Fault 27: resuming at any step equals the uninterrupted run bit for bit, selections included."""
    setting: dict[str, Any] = {"tune": lift(every=2, svd="randomized"), "dtype": dtype, "keep_base": True}
    run = build(engine, **setting)
    saved = []
    for k in range(5):
        saved.append(save(tmp_path / f"step-{k}", run, {"step": k}))
        go(run, now, k, k + 1)
    for k in (1, 2, 3):
        fresh = build(engine, **setting)
        restore(saved[k], fresh)
        go(fresh, now, k, 5)
        assert_equal(everything(fresh), everything(run))


@pytest.mark.parametrize("option", ["rank", "lora_rank", "every"])
def test_numbers_below_one_are_refused(option: str) -> None:
    with pytest.raises(LuthierError, match=f"{option} is 0"):
        registry.make({"lift": {option: 0}}, ("selective",))


def test_what_is_no_matrix_is_refused(engine: Any) -> None:
    with pytest.raises(LuthierError, match="entries of matrices"):
        engine({"lift": {"target_modules": ["norm"]}})
