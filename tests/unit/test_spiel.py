"""SpIEL against the paper's rules: what is exchanged when, with which moments, and what it comes down to."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Now, Seen
from luthier.methods.optimizer.adamw import adamw
from luthier.methods.selective._entries import largest
from luthier.methods.selective._growth import exchange, grow_by_momentum
from luthier.registry import make
from luthier.training.checkpoint import restore, save
from tests.conftest import split
from tests.toys.helpers import gradients, model_of, plain_gradients, rows_of_eight
from tests.unit.selective_oracles import PLACE

INDEX = torch.tensor([3, 7, 11, 15])
CHANGE = torch.tensor([0.1, -0.4, 0.05, 0.3])


@pytest.mark.parametrize(
    ("candidates", "sums", "wanted"),
    [
        ([7, 11, 2, 9], [9.0, -5.0, 1.0, -4.0], [9, 7, 11, 15]),  # 7 still trains; 11 is dropped and grown; 9 takes 3's slot
        ([7, 15, 2, 11], [9.0, -5.0, 1.0, 0.1], [2, 7, 11, 15]),
        ([7, 15, 2], [9.0, -5.0, 1.0], [3, 7, 2, 15]),  # one candidate for two drops: the least changed goes
        ([7, 15], [9.0, -5.0], [3, 7, 11, 15]),
    ],
)
def test_an_exchange_by_hand(candidates: list[int], sums: list[float], wanted: list[int]) -> None:
    candidate = torch.tensor(candidates)
    slot, grown = exchange(INDEX, CHANGE, candidate, torch.tensor(sums), 2)
    assert INDEX.index_copy(0, slot, candidate[grown]).tolist() == wanted


def test_ties_of_an_exchange_go_to_the_first() -> None:
    """Of entries that did not move, and of candidates that promise alike: on every process and in every resumed run the same."""
    slot, grown = exchange(torch.arange(0, 200, 2), torch.zeros(100), torch.arange(1, 201, 2), torch.ones(100), 30)
    assert slot.tolist() == grown.tolist() == list(range(30))


@pytest.mark.parametrize(
    ("index", "learnt", "count", "wanted", "take"),
    [
        # Free are 3 and 6, which promise 4 and 6: they take the slots of 0 and 5, which learnt least.
        ([0, 1, 2, 4, 5, 7], [0.1, 0.5, -0.4, 0.3, 0.2, 0.6], 6, [6, 1, 2, 4, 3, 7], [-1, 1, 2, 3, -1, 5]),
        ([0, 1, 7], [0.5, -0.1, 0.6], 1, [0, 6, 7], [0, -1, 2]),
        ([0, 1, 2, 3, 4, 5, 6, 7], [0.1] * 8, 8, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_momenta_grow_where_something_is_free(
    index: list[int], learnt: list[float], count: int, wanted: list[int], take: list[int]
) -> None:
    """No more are exchanged than do not train, and those that learnt least."""
    one = SimpleNamespace(place=PLACE, index=torch.tensor(index), master=1.0 + torch.tensor(learnt))
    services = SimpleNamespace(start_weight=lambda place: torch.ones(len(index)))
    state = {f"rows {PLACE}": torch.tensor([[1.0], [2.0]]), f"columns {PLACE}": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}
    found = grow_by_momentum(state, services, one, count)  # type: ignore[arg-type]
    assert found.index.tolist() == wanted and found.take.tolist() == take


def test_seeded_moments_are_corrected_back_to_what_was_seen(now: Now) -> None:
    """Five steps of gradient 2 with mean square 4: m = 2(1 - 0.9^5), and the next step is the learning rate exactly."""

    class One:
        master, changes, axis, rate, decay, anchor = torch.zeros(2, dtype=torch.float64), True, 0, 1.0, False, None

    optimizer = adamw(epsilon=1e-30)
    state = optimizer.init(One())  # type: ignore[arg-type]
    is_new = torch.tensor([True, False])
    two = torch.full((2,), 2.0, dtype=torch.float64)
    assert optimizer.seed is not None
    optimizer.seed(state, is_new, Seen(two, 2 * two, 5))
    assert torch.allclose(state["first"], torch.tensor([0.81902, 0.0], dtype=torch.float64), atol=1e-12)
    assert state["age"].tolist() == [5.0, 0.0] and state["second"][1] == 0
    value = One.master.clone()
    optimizer.step(value, two.clone(), state, One(), now)  # type: ignore[arg-type]
    assert torch.allclose(state["first"][0] / (1 - 0.9**6), two[0], rtol=1e-12)
    assert torch.allclose(state["second"][0] / (1 - 0.999**6), 2 * two[0], rtol=1e-10)
    assert torch.allclose(value, torch.full_like(two, -0.1), rtol=1e-10)
    assert state["age"].tolist() == [6.0, 1.0]


def trained_of(run: Any) -> dict[str, Any]:
    return {name: one for name, one in run.tune.trained.items() if one.slot == "spiel"}


def go(run: Any, now: Now, first: int, last: int) -> None:
    for i in range(first, last):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))


@pytest.mark.parametrize("criterion", ["gradient", "momentum"])
def test_the_exchanges_of_a_hundred_steps(engine: Any, criterion: str) -> None:
    """S = 20, gamma = 5: the exchanges stand behind steps 5, 25, 45 ..., over 5 and then 6 steps each, of 1, 0.15, 0.11 ..."""
    options = {"density": 0.02, "target_modules": ["mlp_down"], "criterion": criterion}
    (value, _) = make({"spiel": options}, ("selective",)).values
    run = engine({"spiel": options}, model=model_of(layers=1), optimizer="adamw", dtype=torch.float32)
    (one,) = trained_of(run).values()
    size = one.numel
    moved, looked = {}, {}
    for i in range(100):
        looked[i + 1] = value.observe is not None and value.observing(Now(i, 100))
        before = one.index.clone()
        run.step([rows_of_eight(seed=i)], Now(step=i, steps=100, learning_rate=0.01))
        if not torch.equal(one.index, before):
            moved[i + 1] = int((one.index != before).sum())
        assert len(one.index.unique()) == len(one.index) == size
    most = {5: size, 25: int(0.15 * size), 45: int(0.11 * size), 65: int(0.07 * size), 85: int(0.03 * size)}
    assert moved.keys() == most.keys()
    assert all(0 < moved[step] <= most[step] for step in moved)
    if criterion == "momentum":
        assert moved == most
    phases = [range(1, 6), range(20, 26), range(40, 46), range(60, 66), range(80, 86), range(100, 101)]
    wanted = [step for phase in phases for step in phase] if criterion == "gradient" else []
    assert [step for step in looked if looked[step]] == wanted


def test_a_gathering_phase_by_hand(engine: Any, now: Now) -> None:
    """The first phase of two steps, on weights that stand still: who grows, and with which moments."""
    options = {"density": 0.01, "target_modules": ["mlp_up"], "every": 4, "gather": 2}
    run = engine({"spiel": options}, model=model_of(layers=1), optimizer="adamw")
    ((name, one),) = trained_of(run).items()
    place, before = one.place.parameter, one.index.clone()
    dense = [plain_gradients(run.tune.model, rows_of_eight(seed=seed))[place].flatten() for seed in (0, 1)]
    still = now._replace(learning_rate=0.0)
    for i in range(2):
        run.step(split(rows_of_eight(seed=i), (5, 3)), still._replace(step=i))
    candidates = set(dense[0].abs().topk(one.numel).indices.tolist())
    assert set(one.index.tolist()) == candidates
    state = run.chain.state["adamw"][name]
    mean = (dense[0] + dense[1])[one.index] / 2
    square = (dense[0].square() + dense[1].square())[one.index] / 2
    new = ~torch.isin(one.index, before)
    assert bool(new.any()) and torch.equal(state["age"], torch.full_like(state["age"], 2.0))
    assert torch.allclose(state["first"][new], (mean * (1 - 0.9**2))[new], rtol=1e-9, atol=1e-18)
    assert torch.allclose(state["second"][new], (square * (1 - 0.999**2))[new], rtol=1e-6, atol=1e-24)
    assert not [key for key in run.states["spiel"] if key.startswith("gathered")]


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_new_entries_are_seeded_with_gradients_as_the_optimizer_gets_them(engine: Any, now: Now, limit: float) -> None:
    """New entries began with the moments of gradients that were not clipped, while the optimizer received clipped ones."""
    options = {"density": 0.01, "target_modules": ["mlp_up"], "every": 4, "gather": 2}
    run = engine({"spiel": options}, model=model_of(layers=1), optimizer=[{"clip": {"norm": limit}}, "adamw"])
    ((name, one),) = trained_of(run).items()
    place, before = one.place.parameter, one.index.clone()
    still, seen = now._replace(learning_rate=0.0), []
    for i in range(2):
        dense = plain_gradients(run.tune.model, rows_of_eight(seed=i))[place].flatten()
        seen.append(dense * min(1.0, limit / float(dense[before].norm() + 1e-6)))
        run.step(split(rows_of_eight(seed=i), (5, 3)), still._replace(step=i))
    state, new = run.chain.state["adamw"][name], ~torch.isin(one.index, before)
    mean = ((seen[0] + seen[1]) / 2)[one.index]
    square = ((seen[0].square() + seen[1].square()) / 2)[one.index]
    assert bool(new.any())
    assert torch.allclose(state["first"][new], (mean * (1 - 0.9**2))[new], rtol=1e-6, atol=1e-18)
    assert torch.allclose(state["second"][new], (square * (1 - 0.999**2))[new], rtol=1e-6, atol=1e-24)


def test_what_a_zero_gradient_was_scaled_by_is_told_by_the_others(engine: Any, now: Now) -> None:
    """One norm scales everything alike: entries whose own gradient is zero are observed with the factor of all."""
    run = engine({"spiel": {"density": 0.01}}, model=model_of(layers=1), optimizer=[{"clip": {"norm": 1.0}}, "sgd"])
    first, *others = trained_of(run).values()
    for one in others:
        one.gradient = torch.ones_like(one.master)
    first.gradient = torch.zeros_like(first.master)
    norm = sum(one.numel for one in others) ** 0.5
    run.chain.observed = frozenset(trained_of(run))
    run.chain.step(now)
    assert run.chain.factor([first.name]) == run.chain.factor([others[0].name]) == pytest.approx(1 / norm, rel=1e-5)


@pytest.mark.parametrize("policy", ["linear", "cosine"])
def test_nothing_joins_at_the_very_end_and_only_the_linear_policy_begins_with_all(engine: Any, policy: str) -> None:
    """Of a run that ends with a gathering phase: behind its last step nothing would learn, and half a cosine begins at the share itself."""
    options = {
        "density": 0.02,
        "target_modules": ["mlp_down"],
        "policy": policy,
        "drop": 0.2,
        "criterion": "momentum",
        "every": 4,
        "gather": 2,
    }
    run = engine({"spiel": options}, model=model_of(layers=1), optimizer="adamw")
    (one,) = trained_of(run).values()
    moved = {}
    for i in range(10):
        before = one.index.clone()
        run.step([rows_of_eight(seed=i)], Now(step=i, steps=10, learning_rate=0.01))
        if not torch.equal(one.index, before):
            moved[i + 1] = int((one.index != before).sum())
    halves = {2: 0.2 * (1 + math.cos(0.2 * math.pi)) / 2, 6: 0.2 * (1 + math.cos(0.6 * math.pi)) / 2}
    shares = {2: 1.0, 6: 0.2 * 0.4} if policy == "linear" else halves
    assert moved == {step: int(share * one.numel) for step, share in shares.items()}


def test_a_run_as_long_as_one_gathering_phase_exchanges_nothing(engine: Any) -> None:
    """The first exchange takes all entries; behind the last step they would stay where they began."""
    options = {"density": 0.02, "target_modules": ["mlp_down"], "every": 4, "gather": 2}
    run = engine({"spiel": options}, model=model_of(layers=1), optimizer="adamw")
    (one,) = trained_of(run).values()
    before = one.index.clone()
    for i in range(2):
        run.step([rows_of_eight(seed=i)], Now(step=i, steps=2, learning_rate=0.01))
    assert torch.equal(one.index, before) and bool((one.master.detach() != one.start).all())


def test_survivors_keep_everything_and_the_dropped_go_back_to_the_base(engine: Any, now: Now) -> None:
    options = {"density": 0.02, "target_modules": ["mlp_down"], "every": 3, "gather": 1, "policy": "cosine", "drop": 0.5}
    run = engine({"spiel": options}, model=model_of(layers=1), optimizer="adamw")
    ((name, one),) = trained_of(run).items()
    base = run.tune.region(one.place).flatten().clone()
    go(run, now, 0, 3)
    index = one.index.clone()
    refreshed = run.tune.refresh
    run.tune.refresh = lambda services_of, now: []
    go(run, now, 3, 4)
    then, moments = one.master.detach().clone(), {k: v.clone() for k, v in run.chain.state["adamw"][name].items()}
    refreshed(lambda slot: run.services(slot, now._replace(step=3)), now._replace(step=3))
    stays = one.index == index
    assert 0 < int((~stays).sum()) <= int(one.numel * 0.5)
    assert torch.equal(one.master.detach()[stays], then[stays])
    assert all(torch.equal(run.chain.state["adamw"][name][key][stays], moments[key][stays]) for key in moments)
    live = run.tune.region(one.place).flatten()
    everything_else = torch.ones_like(base, dtype=torch.bool)
    everything_else[one.index[stays]] = False
    assert torch.equal(live[everything_else], base[everything_else])
    changed = (then - base[index]).abs()
    assert changed[~stays].max() <= changed.sort().values[int(one.numel * 0.5)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_of_entries_are_autograds(engine: Any, now: Now, architecture: str) -> None:
    model = model_of(architecture)
    wanted = plain_gradients(model, rows_of_eight())
    run = engine("spiel", model=model)
    found = gradients(run, split(rows_of_eight(), (5, 3)), now)
    for name, one in trained_of(run).items():
        full = wanted[one.place.parameter]
        full = full.t() if one.place.module in run.tune.parts.transposed else full
        full = full if one.place.start is None else full[one.place.start : one.place.stop]
        assert torch.allclose(found[name], full.reshape(-1)[one.index], rtol=0, atol=1e-12)


def test_all_entries_without_exchange_are_full_fine_tuning(engine: Any, now: Now) -> None:
    found = []
    spiel = {"spiel": {"density": 1.0, "policy": "cosine", "drop": 0.0}}
    for tune in (spiel, {"full": {"target_modules": ["linear"]}}):
        run = engine(tune, model=model_of(), optimizer="adamw")
        go(run, now, 0, 8)
        found.append({name: one.detach().clone() for name, one in run.tune.model.named_parameters()})
    assert all(torch.allclose(value, found[1][name], rtol=0, atol=1e-12) for name, value in found[0].items())


def test_the_budget_counts_the_whole_model_and_is_shared_by_size(engine: Any) -> None:
    model = model_of(layers=3)
    run = engine({"spiel": {"density": 0.01}}, model=model, optimizer="adamw")
    everything = sum(one.numel() for one in model.parameters())
    sizes = {name: run.tune.region(one.place).numel() for name, one in trained_of(run).items()}
    for name, one in trained_of(run).items():
        assert one.numel == int(0.01 * everything) * sizes[name] // sum(sizes.values())
    assert 0 < int(0.01 * everything) - run.tune.numbers() < len(sizes)


def test_one_entry_of_each_weight_trains_at_least_and_all_may_be_dropped(engine: Any) -> None:
    run = engine({"spiel": {"density": 1e-9, "drop": 1.0, "every": 2, "gather": 1}}, model=model_of(layers=1), optimizer="adamw")
    assert {one.numel for one in trained_of(run).values()} == {1}


def test_adamw_holds_two_numbers_for_each_entry_and_its_age(engine: Any, now: Now) -> None:
    run = engine("spiel", model=model_of(), optimizer="adamw")
    go(run, now, 0, 2)
    held = sum(value.numel() for value in run.chain.tensors().values() if isinstance(value, Tensor))
    assert held == 3 * run.tune.numbers()


@pytest.mark.parametrize("criterion", ["gradient", "momentum"])
def test_momenta_are_sm3s_and_no_dense_gradient_is_formed(engine: Any, now: Now, criterion: str) -> None:
    """With the momentum criterion, the technique's own accumulators are those of the optimizer SM3, bit for bit."""
    options = {"density": 0.01, "target_modules": ["mlp_up"], "criterion": criterion, "every": 3, "gather": 1}
    run = engine({"spiel": options}, model=model_of(layers=1), optimizer="sm3")
    for i in range(7):
        run.tune.start_observing(now._replace(step=i))
        assert bool(run.tune.observing) == (criterion == "gradient" and (i + 1) % 3 <= 1)
        go(run, now, i, i + 1)
    if criterion == "momentum":
        ((name, one),) = trained_of(run).items()
        own, optimizers = run.states["spiel"], run.chain.state["sm3"][name]
        assert torch.equal(own[f"rows {one.place}"], optimizers["sums 0"]) and bool(optimizers["sums 0"].any())
        assert torch.equal(own[f"columns {one.place}"], optimizers["sums 1"])


def test_momentum_grows_where_row_and_column_are_large(engine: Any, now: Now) -> None:
    options = {"density": 0.002, "target_modules": ["mlp_up"], "criterion": "momentum", "every": 3, "gather": 1}
    run = engine({"spiel": options}, model=model_of(layers=1), optimizer="sm3")
    ((_, one),) = trained_of(run).items()
    before = one.index.clone()
    go(run, now, 0, 1)
    state = run.states["spiel"]
    score = (state[f"rows {one.place}"] @ state[f"columns {one.place}"]).flatten()
    score[before] = -1
    assert not torch.isin(one.index, before).any()
    assert set(one.index.tolist()) == set(largest(score, one.numel).tolist())


@pytest.mark.parametrize("criterion", ["gradient", "momentum"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_resumed_in_the_middle_of_a_phase(engine: Any, now: Now, tmp_path: Path, criterion: str, architecture: str) -> None:
    def build() -> Any:
        tune = {"spiel": {"criterion": criterion, "every": 4, "gather": 2}}
        run = engine(
            tune,
            model=model_of(architecture, layers=1),
            optimizer="sm3" if criterion == "momentum" else {"adamw": {"weight_decay": 0.1}},
        )
        run.tune.model.train()
        return run

    run = build()
    for k in range(7):
        save(tmp_path / f"{k}", run, {})
        go(run, now, k, k + 1)
    wanted = {name: one.detach().clone() for name, one in run.tune.model.named_parameters()}
    for k in range(1, 7):
        fresh = build()
        restore(tmp_path / f"{k}", fresh)
        go(fresh, now, k, 7)
        assert all(torch.equal(one, wanted[name]) for name, one in fresh.tune.model.named_parameters()), k


def test_weight_decay_pulls_to_the_base(engine: Any, now: Now) -> None:
    """Gradients at zero: what an entry learnt shrinks by 1 - 0.1 x 0.5 a step, and the base stays where it is."""
    run = engine({"spiel": {"target_modules": ["mlp_up"]}}, model=model_of(layers=1), optimizer={"adamw": {"weight_decay": 0.5}})
    ((name, one),) = trained_of(run).items()
    start = one.start.clone()
    run.tune.set({name: start + 1.0})
    one.gradient = torch.zeros_like(start)
    run.chain.step(now)
    assert torch.allclose(one.master.detach(), start + 0.95, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.01}, "density"),
        ({"gather": 20}, "does not fit"),
        ({"gather": 0}, "does not fit"),
        ({"drop": 1.01}, "share to drop"),
        ({"drop": -0.01}, "share to drop"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(LuthierError, match=match):
        make({"spiel": options}, ("selective",))
