"""The step: its order, its optimizers, and what cannot go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Callback, LossTerm, Now, Optimizer, Place, Select, Selective, Services, Tensors, View
from luthier.methods.optimizer.adamw import _correction
from luthier.training.chain import round_stochastically
from luthier.training.world import World
from tests.conftest import split
from tests.tolerance import assert_rounded, rounding
from tests.toys.helpers import gradients, model_of, plain_gradients, rows_of_eight, toys  # noqa: F401

ROUNDINGS = 10 * 8
"""Ten steps of AdamW, each of them two moments, their corrections, a root, a quotient, the decay and the sum."""


def give(run: Any, step: int) -> dict[str, Tensor]:
    """Put random gradients in, as a source would."""
    given = {}
    for i, (name, one) in enumerate(run.tune.trained.items()):
        rng = torch.Generator().manual_seed(1000 * step + i)
        given[name] = torch.randn(one.master.shape, generator=rng).to(one.master.dtype)
        one.gradient = given[name].clone()
    return given


def masters(run: Any) -> dict[str, Tensor]:
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items()}


@pytest.mark.parametrize(("fused", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_adamw_equals_pytorchs_over_ten_steps(engine: Any, now: Now, fused: bool, dtype: torch.dtype) -> None:
    run = engine("full", model=model_of(), optimizer={"adamw": {"weight_decay": 0.1}}, dtype=dtype)
    copies = {name: one.clone().requires_grad_(True) for name, one in masters(run).items()}
    groups = [
        {"params": [copies[n] for n, one in run.tune.trained.items() if one.decay], "weight_decay": 0.1},
        {"params": [copies[n] for n, one in run.tune.trained.items() if not one.decay], "weight_decay": 0.0},
    ]
    assert all(group["params"] for group in groups)
    torchs = torch.optim.AdamW(groups, fused=fused)
    for i in range(10):
        rate = 0.01 * (i + 1)
        for name, gradient in give(run, i).items():
            copies[name].grad = gradient
        for group in torchs.param_groups:
            group["lr"] = rate
        torchs.step()
        run.chain.step(now._replace(step=i, learning_rate=rate))
    for name, value in masters(run).items():
        if fused:
            assert torch.equal(value, copies[name].detach()), name
        else:
            assert_rounded(value, copies[name].detach(), ROUNDINGS, what=name)


def test_adamw_without_memory_steps_by_the_sign(engine: Any, now: Now) -> None:
    run = engine("full", model=model_of(), optimizer={"adamw": {"beta1": 0.0, "beta2": 0.0}})
    before, given = masters(run), give(run, 0)
    run.chain.step(now._replace(learning_rate=0.25))
    for name, value in masters(run).items():
        assert torch.allclose(value, before[name] - 0.25 * given[name] / (given[name].abs() + 1e-8), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_age_for_each_entry_equals_one_age_when_nothing_changes(engine: Any, now: Now, dtype: torch.dtype) -> None:
    def choose(parts: Any, services: Services) -> dict[Place, Select]:
        return {place: Select("rows", torch.arange(0, 30, 3)) for place in parts.select(target_modules=["mlp_down"])}

    stays: list[Any] = [None, lambda state, services: {}]
    runs = [
        engine(Selective(choose, refresh=refresh), model=model_of(), optimizer={"adamw": {"weight_decay": 0.1}}, dtype=dtype)
        for refresh in stays
    ]
    for i in range(10):
        for run in runs:
            give(run, i)
            run.chain.step(now._replace(step=i, learning_rate=0.01))
    aged = next(iter(runs[1].chain.state["adamw"].values()))["age"]
    assert aged.shape == (10, 1) and (aged == 10).all()
    for name, value in masters(runs[1]).items():
        assert_rounded(value, masters(runs[0])[name], ROUNDINGS, what=name)


def test_the_correction_of_young_moments_loses_no_digits_in_fp32() -> None:
    age = torch.tensor([1.0, 2.0, 1000.0])
    exact = 1 - 0.999 ** age.double()
    # The logarithm, its product with the age, and the function itself are rounded.
    assert torch.allclose(_correction(0.999, age, torch.float32).double(), exact, rtol=rounding(torch.float32, 3), atol=0)
    assert torch.equal(_correction(0.0, age, torch.float32), torch.ones(3))


def test_a_gradient_laid_out_otherwise_gives_the_same_step(engine: Any, now: Now) -> None:
    """Fused optimizers walk memory: a transposed view must not pair numbers with those of other places."""
    runs = [engine("full", model=model_of(), optimizer="adamw") for _ in range(2)]
    for run, turned in zip(runs, (False, True), strict=True):
        give(run, 0)
        for one in run.tune.trained.values():
            if turned and one.gradient.ndim == 2:
                one.gradient = one.gradient.t().contiguous().t()
        run.chain.step(now)
    assert all(torch.equal(value, masters(runs[1])[name]) for name, value in masters(runs[0]).items())


def test_masters_of_slices_are_contiguous_however_the_weight_is_stored(engine: Any) -> None:
    run = engine(["some_rows", {"some_cols": {"target_modules": ["attention_output"]}}], architecture="gpt2")
    assert all(one.master.is_contiguous() for one in run.tune.trained.values())


@pytest.mark.parametrize("norm", [0.0, 0.1, 300.0, 1e6])
def test_clipping_equals_pytorchs(engine: Any, now: Now, norm: float) -> None:
    """The joint norm is about 200: 300 is above it by less than twice."""
    run = engine("full", model=model_of(), optimizer=[{"clip": {"norm": norm}}, "sgd"])
    before = masters(run)
    copies = {name: torch.zeros_like(value, requires_grad=True) for name, value in before.items()}
    given = give(run, 0)
    for name, gradient in given.items():
        copies[name].grad = gradient.clone()
    if norm:
        torch.nn.utils.clip_grad_norm_(list(copies.values()), norm)
    run.chain.step(now._replace(learning_rate=1.0))
    for name, value in masters(run).items():
        assert torch.allclose(before[name] - value, copies[name].grad, rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(("norm", "factor"), [(2.0, 2 / (5 + 1e-6)), (4.9, 4.9 / (5 + 1e-6)), (6.0, 1.0)])
def test_a_joint_norm_of_5_by_hand(now: Now, norm: float, factor: float) -> None:
    """It is kept once, for the record, and gradients that are short enough are left as they are."""
    values = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([-4.0], dtype=torch.float64)]
    states: list[dict[str, Any]] = [{}, {}]
    found = torch.cat(registry.part("clip", norm=norm).values[0].update(values, states, [], now))
    assert torch.allclose(found, factor * torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64), rtol=1e-12, atol=0)
    assert states == [{"norm": 5.0}, {}]


def test_sgd_by_hand(engine: Any, now: Now) -> None:
    run = engine({"some_cols": {"rate": 0.5}}, model=model_of(), optimizer={"sgd": {"momentum": 0.9}})
    (name, one), *_ = run.tune.trained.items()
    before = one.master.detach().clone()
    first, second = give(run, 0)[name], None
    run.chain.step(now._replace(learning_rate=0.2))
    assert_rounded(one.master, before - 0.1 * first, 3)
    second = give(run, 1)[name]
    run.chain.step(now._replace(learning_rate=0.2))
    assert_rounded(one.master, before - 0.1 * first - 0.1 * (0.9 * first + second), 6)


def test_the_order_decides_whether_gradients_or_updates_are_projected(engine: Any, now: Now) -> None:
    leaks = []
    for step in (["clip", "adamw", "project_out"], ["project_out", "clip", "adamw"]):
        run = engine("full", model=model_of(), optimizer=step, dtype=torch.float32)
        before = masters(run)
        for i in range(5):
            run.step(split(rows_of_eight(), (5, 3)), now._replace(step=i, learning_rate=0.01))
        worst = 0.0
        for name, state in run.chain.state["project_out"].items():
            change = masters(run)[name] - before[name]
            left_O = torch.linalg.svd(before[name], full_matrices=False)[0][:, 0]
            assert torch.allclose(state["guard_OK"][:, 0].abs(), left_O.abs(), atol=1e-6)
            assert float(change.norm()) > 1e-3
            worst = max(worst, float((left_O @ change).norm() / change.norm()))
        leaks.append(worst)
    assert leaks[0] < 1e-6 and leaks[1] > 1e-2


def test_every_tensor_has_exactly_one_optimizer(engine: Any, now: Now) -> None:
    run = engine("full", model=model_of(), optimizer=["low_rank_sgd", "adamw"])
    matrices = {name for name, one in run.tune.trained.items() if one.master.ndim == 2}
    assert {name for name, slot in run.chain.optimizer_of.items() if slot == "low_rank_sgd"} == matrices
    assert set(run.chain.optimizer_of) == set(run.tune.trained)
    run.step([rows_of_eight()], now)
    assert set(run.chain.state["low_rank_sgd"]) == matrices
    assert set(run.chain.state["adamw"]) == set(run.tune.trained) - matrices != set()


def test_sign_before_sgd_by_hand(engine: Any, now: Now) -> None:
    run = engine("full", model=model_of(), optimizer=["sign", "sgd"])
    before, given = masters(run), give(run, 0)
    run.chain.step(now._replace(learning_rate=0.25))
    assert all(torch.equal(value, before[n] - 0.25 * given[n].sign()) for n, value in masters(run).items())


def some_rows_touch(slot_value: float = 3.0) -> LossTerm:
    """A term whose own number gets a gradient from the micro-batch with the first row only."""

    def total(view: View, own: Tensors) -> Tensor:
        touched = own["number"].sum() * slot_value if "row0" in view.batch.row_ids else 0.0
        return view["nll"].sum() + touched

    return LossTerm(total, start=lambda services: {"number": torch.ones(2)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tune", ["full", "lora", "some_rows"])
@pytest.mark.parametrize("step", ["sgd", "adamw", ["adamw", "sign"]], ids=str)
def test_updates_inside_backward_equal_updates_after_it(engine: Any, now: Now, tune: str, step: Any, dtype: torch.dtype) -> None:
    found = []
    for source in ("backprop", "per_layer"):
        run = engine(
            tune, model=model_of(tied=True), objective=some_rows_touch(), optimizer=step, gradient_estimator=source, dtype=dtype
        )
        for i in range(3):
            run.step(split(rows_of_eight(), (3, 4, 1)), now._replace(step=i, learning_rate=0.01))
            assert all(one.gradient is None for one in run.tune.trained.values())
        found.append(masters(run))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    (number,) = [value for name, value in found[0].items() if name.endswith("number")]
    assert (number != 1).all()


def test_the_zeroth_order_slope_is_the_directional_derivative(engine: Any, now: Now) -> None:
    model = model_of()
    full = plain_gradients(model, rows_of_eight())
    run = engine({"full": {"target_modules": ["mlp_down"]}}, model=model, gradient_estimator={"zeroth_order": {"scale": 1e-5}})
    before = masters(run)
    run.step(split(rows_of_eight(), (5, 3)), now._replace(learning_rate=1.0))
    update = {name.removeprefix("full/"): before[name] - value for name, value in masters(run).items()}
    size = sum(float(one.square().sum()) for one in update.values()) ** 0.5
    numbers = sum(one.numel() for one in update.values())
    # The update is slope x noise, and the slope is gradient . noise.
    slope_squared = sum(float((full[name] * one).sum()) for name, one in update.items())
    assert abs(size / slope_squared**0.5 - numbers**0.5) < 0.05 * numbers**0.5


def refused(engine: Any, message: str, **more: Any) -> None:
    with pytest.raises(LuthierError, match=message):
        engine(**more)


def test_what_cannot_go_together_is_refused_by_name(engine: Any) -> None:
    refused(engine, "no optimizer is named", optimizer="clip")
    refused(engine, "no optimizer takes `full/model.layers.0.input_layernorm.weight`", optimizer="low_rank_sgd")
    refused(engine, r"`adamw\.2` takes none", optimizer=["adamw", "adamw"])
    refused(engine, "`project_out` takes none", tune="some_rows", optimizer=["adamw", "project_out"])
    refused(engine, "`clip` needs all gradients at once", gradient_estimator="per_layer", optimizer=["clip", "adamw"])
    refused(engine, "`clip` needs all gradients at once", gradient_estimator="zeroth_order", optimizer=["clip", "adamw"])
    refused(engine, "`some_entries` observes whole gradients", tune="some_entries", gradient_estimator="zeroth_order")
    refused(engine, "`growing` observes whole gradients", tune="growing", gradient_estimator="per_layer")
    callback = Callback(needs=frozenset({"gradients"}))
    refused(engine, "`callback` needs all gradients at once", callbacks=callback, gradient_estimator="per_layer")
    refused(engine, "not summed over several processes", gradient_estimator="per_layer", world=World(2, 0))
    refused(engine, "nothing trains", tune=[])
    refused(engine, "nothing is minimized", objective=[])
    refused(engine, "finds no place with the module types expert", tune={"lora": {"target_modules": ["expert"]}})
    empty = Selective(lambda parts, services: {})
    refused(engine, "`selective` selects nothing", tune=empty)


def test_two_techniques_on_the_same_numbers_are_refused_and_both_are_named(engine: Any) -> None:
    refused(engine, r"`full\.2` and `full` both train the same numbers", tune=["full", "full"])
    rows = {"some_rows": {"target_modules": ["mlp_down"], "every": 2}}
    cols = {"some_cols": {"target_modules": ["mlp_down"], "every": 2}}
    refused(engine, "`some_cols` and `some_rows` both train", tune=[rows, cols])
    value = {"full": {"target_modules": ["attention_value"]}}
    refused(
        engine,
        "`some_rows` and `full` both train",
        tune=[value, {"some_rows": {"target_modules": ["attention_value"]}}],
        architecture="gpt2",
    )


def odd_rows(parts: Any, services: Services) -> dict[Place, Select]:
    return {place: Select("rows", torch.arange(1, 32, 2)) for place in parts.select(target_modules=["mlp_down"])}


@pytest.mark.parametrize(
    "tune",
    [
        [{"full": {"target_modules": ["attention_key"]}}, {"full": {"target_modules": ["attention_value"]}}],
        [{"some_rows": {"target_modules": ["mlp_down"], "every": 2}}, Selective(odd_rows)],
        ["half", {"lora": {"target_modules": ["attention_query"]}}],
        ["lora", "lora"],
    ],
    ids=["fused", "rows", "half and lora", "two loras"],
)
def test_disjoint_selections_and_stacked_deltas_go_together(engine: Any, now: Now, tune: Any) -> None:
    run = engine(tune, model=model_of("gpt2"), optimizer="adamw")
    found = gradients(run, [rows_of_eight()], now)
    assert set(found) == set(run.tune.trained)
    before = masters(run)
    for i in range(2):
        run.step([rows_of_eight()], now._replace(step=i, learning_rate=0.01))
    assert all(not torch.equal(value, before[name]) for name, value in masters(run).items())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("adamw", {"beta1": 1.0}, "beta1 is 1"),
        ("adamw", {"beta2": -0.1}, "beta2 is -0.1"),
        ("adamw", {"weight_decay": -0.1}, "the weight decay is -0.1"),
        ("adamw", {"epsilon": 0.0}, "epsilon is 0"),
        ("sgd", {"momentum": 1.0}, "the momentum is 1"),
        ("clip", {"norm": -0.1}, "the norm is -0.1"),
    ],
)
def test_options_just_out_of_range_are_refused(name: str, options: dict[str, float], says: str) -> None:
    with pytest.raises(LuthierError, match=says):
        registry.part(name, **options)


def moves(
    step: Callable[..., None], init: Callable[[Any], dict[str, Any]] = lambda trained: {}, only: Callable[[Any], bool] | None = None
) -> Optimizer:
    return Optimizer(init, step, takes=only)


def test_an_optimizer_behind_which_nothing_stands_moves_the_numbers_themselves(engine: Any, now: Now) -> None:
    """A transform in front of it is no reason to work on a copy. Gradients lie in memory as the numbers do."""
    seen: list[Tensor] = []

    def step(value: Tensor, gradient: Tensor, state: Any, trained: Any, now: Now) -> None:
        assert gradient.stride() == value.stride() and value.data_ptr() == trained.master.data_ptr()
        seen.append(gradient.clone())
        value.sub_(gradient)

    run = engine("full", model=model_of(layers=1), optimizer=["sign", moves(step)])
    before, given = masters(run), give(run, 0)
    for one in run.tune.trained.values():
        if one.gradient.ndim == 2:
            one.gradient = one.gradient.t().contiguous().t()
    run.chain.step(now)
    assert len(seen) == len(given)
    assert all(torch.equal(value, before[name] - given[name].sign()) for name, value in masters(run).items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_stands_behind_an_optimizer_gets_its_update(engine: Any, now: Now, dtype: torch.dtype) -> None:
    """Powers of two, which no type rounds."""
    run = engine("full", model=model_of(layers=1), optimizer=["sgd", "sign"], dtype=dtype)
    for name, one in run.tune.trained.items():
        run.tune.set({name: torch.full_like(one.master.detach(), 4.0)})
    given = give(run, 0)
    run.chain.step(now._replace(learning_rate=0.25))
    assert all(torch.equal(value, 4.0 - given[name].sign().to(value)) for name, value in masters(run).items())


def test_state_is_put_back_where_it_was(engine: Any, now: Now) -> None:
    """In place where the shape is the same, since fused optimizers ask for the master's strides; names may hold bars."""

    def init(trained: Any) -> dict[str, Any]:
        return {"mean": torch.zeros_like(trained.master.detach()), "a|b": torch.zeros(2), "count": 0}

    def step(value: Tensor, gradient: Tensor, state: Any, trained: Any, now: Now) -> None:
        state["mean"].add_(gradient)
        state["a|b"] = torch.arange(3.0)
        state["count"] += 1

    first, second = (engine("full", model=model_of(layers=1), optimizer=moves(step, init)) for _ in range(2))
    give(first, 0)
    first.chain.step(now)
    (slot,) = second.chain.state
    held = {name: state["mean"] for name, state in second.chain.state[slot].items()}
    second.chain.load(
        {path: value.clone() if isinstance(value, Tensor) else value for path, value in first.chain.tensors().items()}
    )
    for name, state in second.chain.state[slot].items():
        wanted = first.chain.state[slot][name]
        assert state.keys() == wanted.keys() and state["mean"] is held[name] and torch.equal(state["mean"], wanted["mean"])
        assert state["a|b"].tolist() == [0.0, 1.0, 2.0] and state["count"] == 1


def test_gradients_that_were_not_kept_are_as_long_as_they_came(engine: Any) -> None:
    chain = engine("full", model=model_of(layers=1)).chain
    assert chain.factor(["full/any"]) == 1.0
    chain.received, chain.came = {"one": torch.tensor([3.0, 4.0])}, {"one": torch.tensor(10.0)}
    assert chain.factor(["one"]) == chain.factor(["other"]) == 0.5


def test_rounding_by_chance_is_right_on_average_and_exact_where_nothing_is_rounded() -> None:
    """What lies one part of 65536 below the next number of bf16 goes down as seldom, and what lies as far above one goes up."""
    rng = torch.Generator().manual_seed(0)
    exact = torch.arange(-300, 300).to(torch.bfloat16).float()
    for _ in range(20):
        assert torch.equal(round_stochastically(exact, torch.bfloat16, rng), exact.to(torch.bfloat16))
    bits = torch.full((1 << 20,), 0x3F800000, dtype=torch.int32)
    for low, share in ((0xFFFF, 1 - 2.0**-16), (1, 2.0**-16), (0x4000, 0.25)):
        up = round_stochastically((bits + low).view(torch.float32), torch.bfloat16, rng).float() - 1.0
        assert set(up.unique().tolist()) == {0.0, 2.0**-7}
        # Five standard deviations of so many draws.
        assert abs(float(up.mean()) * 2**7 - share) < 5 * (share * (1 - share) / (1 << 20)) ** 0.5
    for value, dtype in (
        (torch.tensor([1.00390625001], dtype=torch.float64), torch.bfloat16),
        (torch.tensor([1.1]), torch.float16),
    ):
        assert torch.equal(round_stochastically(value, dtype, rng), value.to(dtype))


def test_a_part_of_the_chain_cannot_be_changed(engine: Any) -> None:
    link = engine("full", model=model_of(layers=1)).chain.links[0]
    with pytest.raises(FrozenInstanceError):
        link.own = True
