"""Whose turn it is: phases, searches and budgets are shares of the steps in which a technique may move, whatever happens beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Batch, Freezing, Now, WeightDelta
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.training.loop import Clock
from luthier.training.schedule import linear
from luthier.tune.turns import Turns, _part
from tests.conftest import split
from tests.contracts.fixtures import engine_of
from tests.toys.helpers import model_of, rows_of_eight

STEPS = 40


def clock(step: int, steps: int = STEPS) -> Now:
    return Now(step=step, steps=steps, learning_rate=0.01)


def go(run: Any, steps: int = STEPS, idle: tuple[int, ...] = ()) -> list[Any]:
    """Take all steps of a run; in some of them no token is a target."""
    run.tune.model.train()
    results = []
    for step in range(steps):
        batch = rows_of_eight(seed=step)
        if step in idle:
            batch = batch._replace(label_BT=torch.full_like(batch.label_BT, -100))
        results.append(run.step(split(batch, (5, 3)), clock(step, steps)))
    return results


def alone(*phases: int, ends: tuple[float, ...] = (), restart: bool = False) -> Freezing:
    return Freezing(ends=ends, restart=restart, alone=frozenset(phases))


def own(turns: Turns, slot: str, steps: int) -> list[tuple[int, int]]:
    """Step and steps of a technique's own clock, at those steps of the run that are its own."""
    at = [Now(step=step, steps=steps) for step in range(steps)]
    return [(turns.own(slot, now).step, turns.own(slot, now).steps) for now in at if turns.moves(slot, now)]


def test_without_phases_every_clock_is_the_runs() -> None:
    turns = Turns({}, ["lora"])
    now = Now(step=3, steps=10, learning_rate=0.5)
    assert turns.own("lora", now) == now and turns.moves("lora", now) and turns.alone(now) is None
    assert turns.borders(10) == turns.restarts(10) == () and turns.first("lora", 10) == 0


def test_a_clock_stands_still_while_another_technique_trains_alone() -> None:
    turns = Turns({"first": alone(0, ends=(0.4,), restart=True), "search": Freezing(ends=(0.5,))}, ["first", "search", "plain"])
    assert own(turns, "plain", 10) == [(i, 6) for i in range(6)] and turns.first("plain", 10) == 4
    assert own(turns, "first", 10) == [(i, 10) for i in range(10)]
    # The search takes half of the steps that are left, not of all.
    assert turns.borders(10) == (4, 7) and turns.restarts(10) == (4,)
    assert [turns.alone(Now(step=i, steps=10)) for i in (0, 3, 4, 9)] == ["first", "first", None, None]
    # Where it may not move yet, its clock shows its first step.
    assert turns.own("plain", Now(step=2, steps=10)) == Now(step=0, steps=6)


def test_a_clock_that_is_not_of_numbers_goes_on() -> None:
    turns = Turns({"first": alone(0, ends=(0.4,))}, ["first"])
    assert turns.own("warmup", Now(step=2, steps=10)) == Now(step=2, steps=10) and turns.moves("warmup", Now(step=2, steps=10))


@pytest.mark.parametrize("order", [("prompt", "heads"), ("heads", "prompt")])
def test_two_that_want_to_train_alone_take_turns_in_their_order(order: tuple[str, str]) -> None:
    phases = {"prompt": alone(0, ends=(0.5,)), "heads": alone(0, ends=(0.25,))}
    turns = Turns({slot: phases[slot] for slot in order}, ["prompt", "heads", "model"])
    whose = [turns.alone(Now(step=i, steps=16)) for i in range(16)]
    assert (
        whose
        == {
            "prompt": ["prompt"] * 8 + ["heads"] * 2 + [None] * 6,
            "heads": ["heads"] * 4 + ["prompt"] * 6 + [None] * 6,
        }[order[0]]
    )
    assert own(turns, "model", 16) == [(i, 6) for i in range(6)]


def test_a_phase_in_the_middle_cuts_a_clock_in_two() -> None:
    turns = Turns({"middle": alone(1, ends=(0.25, 0.5)), "other": Freezing(ends=(1 / 3,), restart=True)}, ["middle", "other"])
    moving = [i for i in range(12) if turns.moves("other", Now(step=i, steps=12))]
    assert moving == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert [turns.own("other", Now(step=i, steps=12)).step for i in range(12)] == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 8]
    # Its third step is the run's seventh.
    assert turns.restarts(12) == (6,) and turns.borders(12) == (3, 6)


def test_phases_of_one_step_and_of_none() -> None:
    turns = Turns({"first": alone(0, ends=(0.1,), restart=True)}, ["first", "other"])
    assert turns.borders(10) == turns.restarts(10) == (1,) and turns.first("other", 10) == 1
    turns.check(10)
    with pytest.raises(LuthierError, match="a run of 4 steps has 4 for `first`, which are too few for its 2 phases"):
        turns.check(4)
    long = Turns({"first": alone(0, ends=(0.9,))}, ["first", "other"])
    assert own(long, "other", 10) == [(0, 1)] and long.own("other", Now(step=4, steps=10)) == Now(step=0, steps=1)
    # Nothing is left for the other one.
    assert own(long, "other", 4) == [] and long.first("other", 4) == 0
    assert long.own("other", Now(step=3, steps=4)) == Now(step=0, steps=1)


def test_the_schedule_begins_again_where_the_phase_does_and_techniques_are_told_of_their_first_rate() -> None:
    """What a technique was told of its first learning rate was that of a run without phases."""
    turns = Turns({"first": alone(0, ends=(0.5,), restart=True)}, ["first", "other"])
    clock = Clock(1000, 2e-4, linear, 30, 0, turns=turns)
    assert clock.first("other") == clock.at(500, 0.0)
    # Each of the two schedules has half of the warm-up's 30 steps.
    assert clock.first("other").learning_rate == clock.first("first").learning_rate == pytest.approx(2e-4 / 15)
    assert [clock.settled(steps) for steps in (1, 500, 501, 1000)] == [False, False, True, True]
    assert Clock(10, 1.0, linear, 0, 0).settled(0)


def test_what_begins_with_its_first_step_gets_the_rate_of_that_step(engine: Any) -> None:
    """LoRA-SB starts where one step of full fine-tuning leads, at the learning rate of its own first step, which may be a later one."""
    batch = rows_of_eight()

    def cores(rate: float) -> list[Tensor]:
        run = engine(
            {"lora_sb": {"rank": 2}},
            model=model_of(layers=1),
            first=lambda slot: clock(20)._replace(learning_rate=rate),
            calibration=lambda rows, source: [batch],
        )
        return [one.master.detach() for one in run.tune.trained.values()]

    for one, twice in zip(cores(0.01), cores(0.02), strict=True):
        assert torch.allclose(2 * one, twice, rtol=1e-12, atol=0)


def ranks(run: Any) -> list[int]:
    return [int((one.master != 0).sum()) for name, one in run.tune.trained.items() if name.endswith(".values")]


def test_adalora_behind_a_prompt_chooses_by_what_it_saw(engine: Any) -> None:
    """While a prompt trained alone, AdaLoRA's clock ran out: it saw no gradient, and kept the first triplets of the list."""
    run = engine(
        ["promot", {"adalora": {"initial_rank": 3, "target_rank": 2}}],
        model=model_of(layers=1),
        optimizer="adamw",
        dtype=torch.float64,
    )
    go(run)
    for kept in run.callbacks:
        kept.callback.after_stage(kept.state, run.services(kept.slot, clock(STEPS - 1)))
    found = ranks(run)
    assert sum(found) == 2 * len(found)
    in_order = [3] * (sum(found) // 3) + [sum(found) % 3] * (sum(found) % 3 > 0)
    assert found != in_order + [0] * (len(found) - len(in_order))
    sensitivities = [value for key, value in run.states["adalora"].items() if key.startswith("sensitivity ")]
    assert all(bool(value.any()) for value in sensitivities)


@pytest.mark.parametrize(("tune", "objective"), [(["loca"], "caft"), (["promot", "loca"], "cross_entropy")])
def test_locations_are_searched_for_behind_the_phases_of_others(engine: Any, tune: list[Any], objective: Any) -> None:
    """A search over the first tenth of the run ended before the model was allowed to move, and no location did."""
    parts = [
        {"loca": {"coefficients": 8, "search": 0.15, "coefficient_steps": 2, "location_steps": 3}} if one == "loca" else one
        for one in tune
    ]
    run = engine(parts, model=model_of(layers=1), objective=objective, optimizer="adamw", dtype=torch.float64)
    go(run)
    moved = [float(one.master.abs().max()) for name, one in run.tune.trained.items() if name.endswith((".rows", ".columns"))]
    assert moved and min(moved) > 0


def test_heads_are_selected_behind_a_prompt(engine: Any) -> None:
    """LoFiT chose among scales that had not been allowed to move: the first heads of the list."""
    run = engine(["promot", "lofit"], model=model_of(layers=2), optimizer="adamw", dtype=torch.float64)
    scales = []
    refresh = run.tune.refresh

    def look(services_of: Any, now: Now) -> Any:
        scales.append([float(one.master.abs().max()) for name, one in run.tune.trained.items() if name.endswith(".scale")])
        return refresh(services_of, now)

    run.tune.refresh = look
    go(run)
    # The prompt has 20 steps, then the scales 10; offsets stand at the chosen heads for the last 10.
    assert all(some and max(some) == 0 for some in scales[:20]) and all(some and min(some) > 0 for some in scales[20:30])
    assert not any(scales[30:]) and any(".offset" in name for name in run.tune.trained)


def test_a_ticket_is_drawn_behind_a_prompt(engine: Any) -> None:
    """LT-SFT stopped in mid-run, since nothing had moved in its first phase: a prompt had trained alone."""
    run = engine(["promot", {"lt_sft": {"share": 0.05}}], model=model_of(layers=1), optimizer="adamw", dtype=torch.float64)
    go(run)
    forms = {one.form for one in run.tune.trained.values() if one.slot == "lt_sft"}
    assert forms == {"flat"}


def without_targets(batch: Batch) -> Batch:
    return batch._replace(label_BT=torch.full_like(batch.label_BT, -100))


def test_entries_are_exchanged_behind_a_step_without_targets(engine: Any) -> None:
    """SpIEL's first exchange, of all entries that were drawn by chance, was tied to one step: without targets in it, it never came."""
    options = {"spiel": {"density": 0.02, "every": 6, "gather": 3}}

    def stays(idle: tuple[int, ...]) -> float:
        run = engine(options, model=model_of(layers=1), optimizer="adamw", dtype=torch.float64)
        before = {name: set(one.index.tolist()) for name, one in run.tune.trained.items()}
        go(run, 5, idle)
        same = [len(before[name] & set(one.index.tolist())) / len(before[name]) for name, one in run.tune.trained.items()]
        return sum(same) / len(same)

    assert stays(()) < 0.2 and stays((2,)) < 0.2
    # Where no step of the phase had targets, there is nothing to choose by.
    assert stays((0, 1, 2)) == 1.0


def test_a_selection_is_made_anew_behind_a_step_without_targets(engine: Any) -> None:
    """LIFT selects every few steps: without targets in that very step, it did not."""
    run = engine(
        {"lift": {"rank": 2, "lora_rank": 1, "every": 4}}, model=model_of(layers=1), optimizer="adamw", dtype=torch.float64
    )
    said = [bool(result.said) for result in go(run, 7, idle=(3,))]
    assert said == [False, False, False, True, False, False, False]


KEEPERS: dict[str, dict[str, Any]] = {
    "sstoken": {"tune": "lora", "token_weight": {"sstoken": {"every": 3, "average": 0.9}}},
    "convergence_balance": {"token_weight": {"convergence_balance": {"validation_source": "other", "every": 3, "window": 2}}},
    "adalora": {"tune": {"adalora": {"initial_rank": 3, "target_rank": 1, "warmup": 0.0, "every": 3}}},
}


def kept(run: Any, name: str) -> tuple[Any, ...]:
    """What a callback holds that it renews every few steps."""
    if name == "adalora":
        return (sum(ranks(run)),)
    found = run.states[name]["losses"] if name == "convergence_balance" else next(iter(run.tune.snapshots[name].values()))
    return tuple(found.flatten().tolist())


@pytest.mark.parametrize("name", KEEPERS)
def test_callbacks_make_up_for_a_step_without_targets(name: str) -> None:
    """What a callback does every few steps was left out where the very step had no targets."""
    run = engine_of(model_of(layers=1), now=clock(0), **KEEPERS[name])
    run.tune.model.train()
    # AdaLoRA counts steps from 0, and begins with lambda at zero.
    idle = 3 if name == "adalora" else 2
    went = []
    for step in range(idle + 2):
        batch = rows_of_eight(seed=step)
        before = kept(run, name)
        if step == idle:
            batch = batch._replace(label_BT=torch.full_like(batch.label_BT, -100))
        run.step([batch], clock(step))
        went.append(kept(run, name) != before)
    assert went[idle:] == [False, True]


def test_a_plan_tells_a_technique_the_rate_of_its_own_first_step() -> None:
    """A technique that waits for a prompt was told the learning rate with which the prompt begins."""
    told: list[Now] = []

    def start(place: Any, weight_OI: Tensor, services: Any) -> dict[str, Tensor]:
        told.append(services.now)
        return {"scale": torch.zeros(1)}

    waits = WeightDelta(start, lambda tensors, x: functional.linear(x, tensors["scale"]), lambda tensors: tensors["scale"])
    train = {"steps": 20, "batch_rows": 2, "warmup": 0.2, "precision": "fp32", "learning_rate": 1e-3}
    rows = {"train": [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(4)]}
    tune = [{"promot": {"share": 0.25, "length": 2}}, waits]
    plan = make_plan(make_recipe({"model": "tiny:llama", "rows": rows, "tune": tune, "train": train}))
    assert plan.clock.factor(0) != plan.clock.factor(5)
    assert {(now.step, now.steps, now.learning_rate) for now in told} == {(0, 15, 1e-3 * plan.clock.factor(5))}


def test_own_steps_lie_in_all_pieces_of_a_clock() -> None:
    assert list(_part([(0, 2), (4, 7), (9, 12)], 1, 7)) == [(1, 2), (4, 7), (9, 11)]
