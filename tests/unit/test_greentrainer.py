"""GreenTrainer: the cost model against counted operations, the selection against brute force, and what the run does with it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Now, Place
from luthier.methods.selective._backward_cost import Cost, Load, costs, load_of, spent, worth_training
from luthier.methods.selective._knapsack import select
from luthier.methods.selective.greentrainer import _importances, importance
from luthier.registry import make
from luthier.training.checkpoint import restore, save
from tests.conftest import calibration, split
from tests.toys.helpers import gradients, model_of, rows_of_eight

STEPS = 20


def price(through: list[int], own: list[int], chosen: list[bool]) -> int:
    """What a choice costs: index 0 is nearest the output."""
    last = max((k for k, wanted in enumerate(chosen) if wanted), default=-1)
    return sum(cost for cost, wanted in zip(own, chosen, strict=True) if wanted) + sum(through[: last + 1])


@pytest.mark.parametrize(
    ("through", "own", "value", "budget", "wanted"),
    [
        # The paper's recurrence, read plainly, replications 16 here; budget is 0.6 of 24.
        ([0, 2, 1, 4, 0], [5, 1, 7, 3, 1], [1, 3, 10, 5, 3], 14, (13, 11, [1, 2])),
        # The authors' code finds 9.
        ([0, 3, 2, 0], [5, 2, 0, 99], [3, 2, 9, -1], 9, (11, 7, [1, 2])),
        ([0, 2, 1, 4, 0], [5, 1, 7, 3, 1], [1, 3, 10, 5, 3], 24, (22, 24, [0, 1, 2, 3, 4])),
        ([1, 1], [1, 1], [-1, 0], 4, (0, 0, [])),
        # The first costs all there is, and the earliest nothing.
        ([0, 0], [2, 0], [3, 1], 2, (4, 2, [0, 1])),
    ],
)
def test_a_selection_by_hand(through: list[int], own: list[int], value: list[float], budget: int, wanted: Any) -> None:
    chosen = select(through, own, value, budget)
    worth, cost, places = wanted
    assert [k for k, one in enumerate(chosen) if one] == places
    assert sum(v for v, one in zip(value, chosen, strict=True) if one) == worth
    assert price(through, own, chosen) == cost


def test_the_selection_is_exact() -> None:
    """Against all choices of up to 8 tensors."""
    rng = random.Random(0)
    for _ in range(300):
        n = rng.randint(1, 8)
        through, own = [rng.randint(0, 6) for _ in range(n)], [rng.randint(0, 6) for _ in range(n)]
        value = [float(rng.randint(-3, 9)) for _ in range(n)]
        budget = rng.randint(0, sum(through) + sum(own))
        chosen = select(through, own, value, budget)
        assert price(through, own, chosen) <= budget
        assert all(one > 0 for one, wanted in zip(value, chosen, strict=True) if wanted)
        fits = (mask for mask in itertools.product([False, True], repeat=n) if price(through, own, list(mask)) <= budget)
        best = max(sum(v for v, wanted in zip(value, mask, strict=True) if wanted) for mask in fits)
        assert sum(v for v, wanted in zip(value, chosen, strict=True) if wanted) == best


def test_a_target_of_one_trains_all_that_is_of_use() -> None:
    found = [Cost(7, 7, 7), Cost(3, 11, 5), Cost(0, 0, 2), Cost(1, 1, 1)]
    assert worth_training(found, [1.0, 0.5, 0.1, 2.0], 1.0) == [True] * 4
    assert worth_training(found, [1.0, 0.5, -0.1, 2.0], 1.0) == [True, True, False, True]
    assert spent(found, [True] * 4) == 1.0
    # From the second on: 11 + 5, 0, 1 + 1 of 34.
    assert spent(found, [False, True, False, True]) == 18 / 34
    assert spent(found, [False] * 4) == 0.0


def test_targets_below_the_forward_pass_are_refused_with_the_least_there_is() -> None:
    found = [Cost(10, 10, 10)] * 3
    with pytest.raises(LuthierError, match=r"the forward pass alone is 0\.33"):
        worth_training(found, [1.0] * 3, 0.33)
    assert worth_training(found, [1.0] * 3, 0.34) == [False] * 3
    assert worth_training(found, [1.0, 1.0, 1.0], 0.6) == [False, False, True]


def test_costs_count_in_thousandths_of_a_backward_pass() -> None:
    """What costs less than one is free, and a target that leaves none at all buys nothing else."""
    for own, wanted in ((9_995, True), (10_000, False)):
        found = [Cost(0, 0, own), Cost(0, 0, 10_000_000 - own)]
        assert worth_training(found, [1.0, 5.0], 0.00005) == [wanted, False]


def test_a_target_of_just_the_forward_pass_leaves_nothing_to_spend() -> None:
    with pytest.raises(LuthierError, match=r"the forward pass alone is 0\.50"):
        worth_training([Cost(20, 10, 10)], [1.0], 0.5)


def test_the_importance_of_a_step_on_a_parabola() -> None:
    """w^2 at 3 with a step of 0.1: 0.1 x 6 x 4.8 = 2.88, where the gradient before the step would say 3.6."""
    w, rate = torch.tensor([3.0], dtype=torch.float64), 0.1
    moved = -rate * 2 * w
    assert importance(2 * (w + moved), moved) == pytest.approx(2.88, abs=1e-12)
    assert importance(2 * w, moved) == pytest.approx(3.6, abs=1e-12)
    assert float(w**2 - (w + moved) ** 2) == pytest.approx(3.24, abs=1e-12)


def test_importance_is_of_the_first_step_of_adam() -> None:
    """Both moments are the gradient's own: a step is the rate, but half of it where the gradient is as small as epsilon."""
    place = Place("up", "weight", "mlp_up", 0)
    slopes = torch.tensor([-3.0, 1e-8, 0.0], dtype=torch.float64)

    def gradients(batches: Any, places: Any, moved: Any = None) -> dict[Place, Tensor]:
        return {place: slopes if moved is None else 10.0 * moved[place]}

    services = SimpleNamespace(now=Now(learning_rate=0.1), gradients=gradients)
    # -sum of 10 moved x moved, with moves of 0.1, -0.05 and 0.
    assert _importances(services, [], [place]) == [pytest.approx(-0.125, rel=1e-7)]  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_costs_of_a_block_are_the_counted_ones(engine: Any, architecture: str) -> None:
    """A block's matrix products, forward and backward, with a gradient of its input, as PyTorch counts them."""
    model = model_of(architecture, layers=1)
    model.set_attn_implementation("eager")
    run = engine("full", model=model)
    rows, length, width = 2, 16, 32
    found = costs(run.services("test", Now()), Load(rows * length, rows * length**2, 0))
    matrices = [cost for place, cost in found.items() if place.block == 0 and "norm" not in place.role and place.tensor == "weight"]
    block = model.get_submodule(run.tune.parts.block_modules[0])
    x = torch.randn(rows, length, width, dtype=torch.float64, requires_grad=True)
    extra = {}
    if architecture == "llama":
        extra["position_embeddings"] = model.model.rotary_emb(x, torch.arange(length)[None])
    with FlopCounterMode(display=False) as forward:
        y = block(x, **extra)
        y = y[0] if isinstance(y, tuple) else y
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert 2 * sum(cost.forward for cost in matrices) == forward.get_total_flops()
    assert 2 * sum(cost.through + cost.own for cost in matrices) == backward.get_total_flops()
    if architecture == "gpt2":
        # 4BND^2 + 2BN^2D + 2BNDF with F = 96, and twice that.
        bnd = rows * length * width
        assert sum(cost.forward for cost in matrices) == 4 * bnd * width + 2 * bnd * length + 2 * bnd * 96


@pytest.mark.parametrize("frozen", [0, 5, 11])
def test_a_frozen_beginning_costs_the_model_less_one_passing(frozen: int) -> None:
    """Twelve equal maps, the first K frozen: 2(12 - K) - 1 units, since the earliest passes nothing on."""
    maps = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(12)))
    for one in list(maps)[:frozen]:
        one.requires_grad_(False)
    y = maps(torch.randn(4, 8))
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    unit = 4 * 8 * 8
    share = spent([Cost(unit, unit, unit)] * 12, [k >= frozen for k in range(12)])
    assert counted.get_total_flops() == 2 * unit * (2 * (12 - frozen) - 1)
    assert share * 24 * unit - unit == counted.get_total_flops() / 2


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_stand_in_the_order_of_the_forward_pass(engine: Any, tied: bool) -> None:
    found = costs(engine("full", model=model_of(layers=1, tied=tied)).services("test", Now()), Load(10, 40, 3))
    names = [place.role for place in found]
    blocks = ["attention_norm", "attention_query", "attention_key", "attention_value", "attention_output", "mlp_norm"]
    assert names == ["embedding", *blocks, "mlp_gate", "mlp_up", "mlp_down", "final_norm", *([] if tied else ["head"])]
    by_role = {place.role: cost for place, cost in found.items()}
    assert by_role["attention_value"] == Cost(10 * 32 * 16 + 2 * 40 * 32, 10 * 32 * 16 + 4 * 40 * 32, 10 * 32 * 16)
    head = 3 * 259 * 32
    assert by_role["embedding"] == Cost(0, 0, 259 * 32 + (head if tied else 0))
    assert by_role["final_norm"] == Cost(*(10 * 32 + (head if tied else 0),) * 2, 10 * 32)
    if not tied:
        assert by_role["head"] == Cost(head, head, head)


def test_biases_cost_their_own_gradient_alone_and_those_of_norms_nothing(engine: Any) -> None:
    found = costs(engine("full", model=model_of("gpt2", layers=1)).services("test", Now()), Load(10, 40, 3))
    assert list(dict.fromkeys(place.role for place in found))[:3] == ["embedding", "position_embedding", "attention_norm"]
    for place, cost in found.items():
        if place.role == "position_embedding":
            assert cost == Cost(0, 0, 10 * 32)
        if place.tensor == "bias":
            width = 32 * 3 if place.role == "mlp_up" else 32
            # Behind the last bias stands the tied head.
            head = 3 * 259 * 32 if place.role == "final_norm" else 0
            assert cost == Cost(head, head, 0 if "norm" in place.role else 10 * width)


def test_the_load_counts_no_padding() -> None:
    assert load_of(split(rows_of_eight(), (5, 3))) == load_of([rows_of_eight()])
    assert load_of([rows_of_eight()]) == Load(61, sum(n * n for n in (9, 6, 12, 5, 7, 10, 4, 8)), 30)


def go(run: Any, now: Now, first: int, last: int) -> None:
    for i in range(first, last):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))


def training(run: Any) -> set[str]:
    return {key.removeprefix("trains ") for key, value in run.states["greentrainer"].items() if key.startswith("trains ") and value}


def test_importance_may_be_measured_on_one_row(engine: Any, now: Now) -> None:
    asked: list[int] = []
    looks = lambda count, source: asked.append(count) or calibration(count, source)  # noqa: E731
    run = engine({"greentrainer": {"calibration_rows": 1}}, model=model_of(), optimizer="adamw", calibration=looks)
    assert training(run) and set(asked) == {1}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_choice_is_what_importance_and_cost_say(engine: Any, now: Now, architecture: str) -> None:
    """Importance by hand: gradients before and behind a step of Adam, on copies of the model."""
    run = engine({"greentrainer": {"target": 0.6}}, model=model_of(architecture), optimizer="adamw")
    services = run.services("greentrainer", now)
    batches, places = calibration(4, ""), [one.place for one in run.tune.trained.values()]
    before = services.gradients(batches, places)
    saved = {name: one.detach().clone() for name, one in run.tune.model.named_parameters()}
    moved = {place: -0.1 * g / (g.abs() + 1e-8) for place, g in before.items()}
    for place in places:
        run.tune.region(place).add_(moved[place])
    after = services.gradients(batches, places)
    for name, one in run.tune.model.named_parameters():
        one.data.copy_(saved[name])
    raw = {place: -float((after[place] * moved[place]).sum()) for place in places}
    found = costs(services, load_of(batches))
    wanted = worth_training(list(found.values()), [raw.get(place, 0.0) for place in found], 0.6)
    assert training(run) == {str(place) for place, one in zip(found, wanted, strict=True) if one}
    assert run.states["greentrainer"]["backward share"] == spent(list(found.values()), wanted)
    assert 0 < len(training(run)) < len(places)


def test_measuring_importance_leaves_everything_as_it_was(engine: Any, now: Now) -> None:
    run = engine({"greentrainer": {"selections": 20, "target": 0.7}}, model=model_of(), optimizer="adamw")
    go(run, now, 0, 2)

    def everything() -> dict[str, Tensor]:
        live = {name: one.detach().clone() for name, one in run.tune.model.named_parameters()}
        return live | {name: value.clone() for name, value in run.chain.tensors().items()}

    before, grads = everything(), [one.requires_grad for one in run.tune.model.parameters()]
    (callback,) = run.callbacks
    callback.callback.after_step(callback.state, run.services("greentrainer", now._replace(step=2)))
    after = everything()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert grads == [one.requires_grad for one in run.tune.model.parameters()]
    assert run.states["greentrainer"]["selection"] == 3


def test_what_a_choice_really_costs_is_logged_and_importance_is_that_for_cross_entropy(engine: Any, now: Now) -> None:
    """The share of a full backward pass was kept and shown to nobody. Importance is of plain cross-entropy, as the card says, whatever
    the run minimizes: the choice is the same."""
    chosen = []
    for objective in ("cross_entropy", {"dco": {"samples": 4}}):
        run = engine("greentrainer", model=model_of(), objective=objective, optimizer="adamw")
        state = run.states["greentrainer"]
        result = run.step([rows_of_eight()], now)
        assert 0.0 < state["backward share"] < 1.0
        assert result.notes.get("greentrainer backward share") == state["backward share"]
        chosen.append({key: value for key, value in state.items() if key.startswith("trains ")})
    assert chosen[0] == chosen[1]
    assert "whatever the run minimizes" in registry.find("greentrainer", ("selective",)).card.departs


def test_what_stands_still_keeps_every_bit_and_has_no_optimizer_state(engine: Any, now: Now) -> None:
    run = engine({"greentrainer": {"target": 0.6, "selections": 1}}, model=model_of(), optimizer={"adamw": {"weight_decay": 0.1}})
    base = {name: one.detach().clone() for name, one in run.tune.model.named_parameters()}
    go(run, now, 0, 3)
    moves = training(run)
    for name, one in run.tune.model.named_parameters():
        assert torch.equal(one, base[name]) == (name not in moves)
    held = run.chain.state["adamw"]
    assert {name.removeprefix("greentrainer/") for name in held} == moves
    numbers = sum(one.numel for name, one in run.tune.trained.items() if name in held)
    assert sum(value.numel() for value in run.chain.tensors().values()) == 2 * numbers + len(held)


def let_train(run: Any, wanted: set[str]) -> None:
    """Make the choice by hand."""
    state = run.states["greentrainer"]
    state.update({key: int(key.removeprefix("trains ") in wanted) for key in state if key.startswith("trains ")})
    assert training(run) == wanted


def test_backward_ends_at_the_earliest_tensor_that_trains(engine: Any, now: Now) -> None:
    run = engine({"greentrainer": {"selections": 1, "target": 0.7}}, model=model_of(layers=4), optimizer="adamw")
    let_train(run, {"model.layers.2.mlp.up_proj.weight", "model.norm.weight"})
    reached = []
    for block in run.tune.model.model.layers:
        block.register_forward_hook(lambda module, x, y: reached.append((y[0] if isinstance(y, tuple) else y).requires_grad))
    run.step([rows_of_eight()], now)
    assert reached == [False, False, True, True]


def test_a_tensor_that_trains_again_begins_anew(engine: Any, now: Now) -> None:
    run = engine({"greentrainer": {"selections": 1, "target": 0.7}}, model=model_of(), optimizer={"adamw": {"weight_decay": 0.1}})
    one, other = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    weight = run.tune.model.get_parameter(one)
    held = run.chain.state["adamw"]
    let_train(run, {one, other})
    go(run, now, 0, 2)
    assert int(held[f"greentrainer/{one}"]["age"]) == 2
    let_train(run, {other})
    learnt = weight.detach().clone()
    go(run, now, 2, 3)
    assert torch.equal(weight, learnt) and set(held) == {f"greentrainer/{other}"}
    let_train(run, {one, other})
    go(run, now, 3, 4)
    assert not torch.equal(weight, learnt)
    assert [int(held[f"greentrainer/{name}"]["age"]) for name in (one, other)] == [1, 4]


def test_the_choice_is_made_again_at_equal_distances(engine: Any, now: Now) -> None:
    run = engine({"greentrainer": {"target": 0.7, "selections": 5}}, model=model_of(), optimizer="adamw")
    chosen, selections = [], []
    for i in range(STEPS):
        before = training(run)
        go(run, now, i, i + 1)
        selections.append(run.states["greentrainer"]["selection"])
        if training(run) != before:
            chosen.append(i + 1)
    assert selections == [min((i + 1) // 4, 4) for i in range(STEPS)]
    assert chosen and set(chosen) <= {4, 8, 12, 16}


def test_a_target_of_one_is_full_fine_tuning_where_all_are_of_use(engine: Any, now: Now) -> None:
    found = []
    for tune in ({"greentrainer": {"target": 1.0}}, {"full": {"target_modules": ["linear", "norm"]}}):
        run = engine(tune, model=model_of(), optimizer="adamw")
        for key in [key for key in run.states.get("greentrainer", {}) if key.startswith("trains ")]:
            run.states["greentrainer"][key] = 1
        go(run, now, 0, 4)
        found.append({name: one.detach().clone() for name, one in run.tune.model.named_parameters()})
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resumed_at_any_step(engine: Any, now: Now, tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    def build() -> Any:
        tune = {"greentrainer": {"target": 0.7, "selections": 10}}
        run = engine(tune, model=model_of(architecture, layers=1), optimizer={"adamw": {"weight_decay": 0.1}}, dtype=dtype)
        run.tune.model.train()
        return run

    run = build()
    for k in range(6):
        save(tmp_path / f"{k}", run, {})
        go(run, now, k, k + 1)
    wanted = {name: one.detach().clone() for name, one in run.tune.model.named_parameters()}
    for k in range(1, 6):
        fresh = build()
        restore(tmp_path / f"{k}", fresh)
        go(fresh, now, k, 6)
        assert all(torch.equal(one, wanted[name]) for name, one in fresh.tune.model.named_parameters()), k


def test_where_no_tensor_is_of_use_a_run_does_not_begin_and_a_choice_stays(
    engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine({"greentrainer": {"selections": 20, "target": 0.7}}, model=model_of(), optimizer="adamw")
    chosen = training(run)
    monkeypatch.setattr("luthier.methods.selective.greentrainer.importance", lambda gradient, moved: -1.0)
    go(run, now, 0, 2)
    assert training(run) == chosen and run.states["greentrainer"]["selection"] == 2
    with pytest.raises(LuthierError, match=r"no tensor that lowers the loss fits into a target of 0\.7"):
        engine({"greentrainer": {"target": 0.7}}, model=model_of())


def test_frozen_tensors_get_no_gradient(engine: Any, now: Now) -> None:
    run = engine({"greentrainer": {"target": 0.6}}, model=model_of(), optimizer="adamw")
    run.tune.freeze(now)
    found = gradients(run, [rows_of_eight()], now)
    assert {name.removeprefix("greentrainer/") for name in found} == training(run)


def test_a_mixture_of_experts_is_refused(engine: Any) -> None:
    with pytest.raises(LuthierError, match="does not know what a mixture of experts costs"):
        engine("greentrainer", model=model_of("mixtral"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": 0.0}, "the target is 0"),
        ({"target": 1.01}, r"the target is 1\.01"),
        ({"selections": 0}, "there are 0 selections"),
        ({"calibration_rows": 0}, "there are 0 rows"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(LuthierError, match=match):
        make({"greentrainer": options}, ("selective",))
