"""Lottery-ticket sparse fine-tuning against the paper's rules: who is chosen, where training goes on, and how deltas add."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.delta import Delta
from luthier.errors import LuthierError
from luthier.kinds import Freezing, Now, Place, State
from luthier.methods.selective._ticket import most_changed
from luthier.methods.selective._ticket import ticket as ticket_of
from luthier.registry import make
from luthier.training.checkpoint import restore, save
from luthier.training.loop import Clock
from luthier.training.schedule import linear
from luthier.tune.trained import region, write
from luthier.tune.turns import Turns
from tests.conftest import split
from tests.toys.helpers import gradients, model_of, rows_of_eight

STEPS = 20
ROLES = ["embedding", "position_embedding", "linear"]


def test_the_most_changed_by_hand() -> None:
    size = [torch.tensor([0.3, 0.5]), torch.tensor([[0.1], [0.2]])]
    assert [one.tolist() for one in most_changed(size, 2)] == [[0, 1], []]
    assert [one.tolist() for one in most_changed(size, 3)] == [[0, 1], [1]]


def test_ties_give_no_more_and_zeros_are_never_chosen() -> None:
    assert [one.tolist() for one in most_changed([torch.ones(3), torch.ones(3)], 4)] == [[0, 1, 2], [0]]
    assert [one.tolist() for one in most_changed([torch.zeros(3), torch.tensor([0.0, 2.0])], 4)] == [[], [1]]


@pytest.mark.parametrize(("count", "wanted"), [(1, [[1], []]), (0, [[], []]), (-3, [[], []])])
def test_where_no_more_are_owed_none_are_chosen(count: int, wanted: list[list[int]]) -> None:
    size = [torch.tensor([0.3, 0.5]), torch.tensor([0.1])]
    assert [one.tolist() for one in most_changed(size, count)] == wanted


MATRIX, BIAS = Place("up", "weight", "mlp_up", 0), Place("up", "bias", "mlp_up", 0)


def drawn(change: Tensor, of_bias: list[float], share: float, state: State, *transposed: str, form: str = "whole") -> Any:
    """The ticket of a weight and its bias, which moved so far; numbers begin at 2."""
    mine = [
        SimpleNamespace(place=place, form=form, master=2.0 + moved, anchor=torch.full_like(moved, 2.0))
        for place, moved in ((MATRIX, change), (BIAS, torch.tensor(of_bias)))
    ]
    sizes = {MATRIX: torch.Size([3, 2]), BIAS: torch.Size([3])}
    services = SimpleNamespace(shape=sizes.__getitem__, parts=SimpleNamespace(transposed=frozenset(transposed)))
    found = ticket_of(state, services, mine, share)  # type: ignore[arg-type]
    assert all(one.form == "flat" and one.take.tolist() == [-1] * len(one.index) for one in found.values())
    return [
        (found[place].index.tolist(), None if found[place].seed is None else found[place].seed.tolist()) for place in (MATRIX, BIAS)
    ]


def test_a_later_ticket_keeps_what_was_chosen_by_hand() -> None:
    """Of 9 numbers 4, of which 2 are chosen already: what they learnt stays, and how far they moved since does not count."""
    state = {f"index {MATRIX}": torch.tensor([1, 4]), f"learnt {MATRIX}": torch.tensor([0.5, -0.5])}
    moved = torch.tensor([0.1, 0.9, -0.2, 0.3, -0.8, 0.05])
    assert drawn(moved, [-0.25, 0.01, 0.0], 0.45, state, form="flat") == [([1, 3, 4], [0.5, 0.0, -0.5]), ([0], None)]
    assert state[f"index {MATRIX}"].tolist() == [1, 3, 4] and state[f"learnt {MATRIX}"].tolist() == [0.5, 0.0, -0.5]


def test_the_smallest_ticket_is_one_number() -> None:
    """One entry stands in where none is chosen, and learnt nothing."""
    moved = torch.tensor([[0.1, 0.0], [0.7, 0.2], [-0.3, 0.4]])
    assert drawn(moved, [0.0, 0.5, 0.0], 0.01, {}) == [([2], None), ([0], None)]
    assert drawn(moved, [0.0, 0.5, 0.0], 0.34, {}) == [([2, 5], None), ([1], None)]
    # Stored the other way around, the numbers have the same positions.
    assert drawn(moved.t().contiguous(), [0.0, 0.5, 0.0], 0.34, {}, "up") == [([2, 5], None), ([1], None)]


def go(run: Any, now: Now, first: int, last: int, seeds: int = STEPS) -> None:
    for i in range(first, last):
        run.step(split(rows_of_eight(seed=i % seeds), (5, 3)), now._replace(step=i, learning_rate=0.01))


def weights(run: Any) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in run.tune.model.named_parameters()}


def ticket(run: Any) -> dict[str, Tensor]:
    """Which numbers are chosen, by parameter, as stored."""
    drawn = copy.deepcopy(run.tune.model)
    for one in drawn.parameters():
        one.data.zero_()
    for one in run.tune.trained.values():
        write(
            region(drawn, one.place, run.tune.parts.transposed), "flat", run.states["lt_sft"][f"index {one.place}"], torch.ones(())
        )
    return {name: one.data.bool() for name, one in drawn.named_parameters()}


def count(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_first_phase_is_full_fine_tuning_and_the_ticket_what_it_moved_most(engine: Any, now: Now, architecture: str) -> None:
    base = weights(engine({"full": {"target_modules": ROLES}}, model=model_of(architecture)))
    full = engine({"full": {"target_modules": ROLES}}, model=model_of(architecture), optimizer="adamw")
    run = engine({"lt_sft": {"share": 0.05}}, model=model_of(architecture), optimizer="adamw")
    numbers = run.tune.numbers()
    assert numbers == full.tune.numbers()
    go(full, now, 0, 10)
    go(run, now, 0, 10)
    chosen, moved = ticket(run), {name: (one - base[name]).abs() for name, one in weights(full).items()}
    assert count(chosen) == int(0.05 * numbers)
    least = min(float(moved[name][mask].min()) for name, mask in chosen.items() if mask.any())
    assert least >= max(float(moved[name][~mask].max()) for name, mask in chosen.items() if not mask.all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_second_phase_begins_at_the_base_and_moves_the_ticket_alone(
    engine: Any, now: Now, architecture: str, dtype: torch.dtype
) -> None:
    """Decay left on would shrink numbers off the ticket: they keep every bit."""
    run = engine({"lt_sft": {"share": 0.05}}, model=model_of(architecture), optimizer={"adamw": {"weight_decay": 0.1}}, dtype=dtype)
    base, numbers = weights(run), run.tune.numbers()
    go(run, now, 0, 9)
    assert all(one.form in ("whole", "rows") for one in run.tune.trained.values())
    go(run, now, 9, 10)
    assert all(torch.equal(one, base[name]) for name, one in weights(run).items())
    assert {one.form for one in run.tune.trained.values()} == {"flat"}
    state = run.chain.tensors()
    assert not any(value.any() for value in state.values())
    assert sum(value.numel() for value in state.values()) == 3 * run.tune.numbers()
    go(run, now, 10, STEPS)
    chosen, changed = ticket(run), {name: one != base[name] for name, one in weights(run).items()}
    assert count(chosen) == int(0.05 * numbers)
    assert 0.9 * count(chosen) < count(changed) <= count(chosen)
    assert not any((mask & ~chosen[name]).any() for name, mask in changed.items())


def test_a_share_of_one_is_full_fine_tuning_from_the_base(engine: Any, now: Now) -> None:
    found = []
    for tune, first in (({"lt_sft": {"share": 1.0}}, 0), ({"full": {"target_modules": ROLES}}, 10)):
        run = engine(tune, model=model_of(), optimizer="adamw")
        # The same rows all along: what did not move in the first phase would not move in the second.
        go(run, now, first, STEPS, seeds=1)
        found.append(weights(run))
    assert all(torch.allclose(one, found[1][name], rtol=0, atol=1e-10) for name, one in found[0].items())


def test_where_nothing_was_chosen_nothing_moves(engine: Any, now: Now) -> None:
    run = engine({"lt_sft": {"share": 0.0005}}, model=model_of(), optimizer="adamw")
    base = weights(run)
    go(run, now, 0, STEPS)
    empty = [one.place.parameter for one in run.tune.trained.values() if not len(run.states["lt_sft"][f"index {one.place}"])]
    assert 0 < len(empty) < len(run.tune.trained)
    after = weights(run)
    assert all(torch.equal(after[name], base[name]) for name in empty)
    assert 0 < count({name: one != base[name] for name, one in after.items()}) <= int(0.0005 * sum(map(torch.numel, base.values())))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_two_iterations_choose_half_each_and_go_on_from_what_was_learnt(engine: Any, now: Now, architecture: str) -> None:
    run = engine({"lt_sft": {"share": 0.04, "iterations": 2}}, model=model_of(architecture), optimizer="adamw")
    base, numbers = weights(run), run.tune.numbers()
    go(run, now, 0, 5)
    first = ticket(run)
    assert count(first) == int(0.02 * numbers)
    go(run, now, 5, 9)
    run.tune.refresh = lambda services_of, now: []
    go(run, now, 9, 10)
    learnt = weights(run)
    del run.tune.refresh
    run.tune.refresh(lambda slot: run.services(slot, now._replace(step=9)), now._replace(step=9))
    assert run.tune.numbers() == numbers
    assert all(torch.allclose(one, learnt[name], rtol=0, atol=1e-15) for name, one in weights(run).items())
    go(run, now, 10, 15)
    both = ticket(run)
    assert count(both) == int(0.04 * numbers) and not any((mask & ~both[name]).any() for name, mask in first.items())
    assert all(torch.allclose(one, learnt[name], rtol=0, atol=1e-15) for name, one in weights(run).items())
    go(run, now, 15, STEPS)
    changed = {name: one != base[name] for name, one in weights(run).items()}
    assert 0.9 * count(both) < count(changed) <= count(both)
    assert not any((mask & ~both[name]).any() for name, mask in changed.items())


def test_three_iterations_choose_a_third_each(engine: Any, now: Now) -> None:
    run = engine({"lt_sft": {"share": 0.05, "iterations": 3}}, model=model_of(layers=1), optimizer="adamw")
    numbers, chosen = run.tune.numbers(), []
    for i in range(STEPS):
        go(run, now, i, i + 1)
        chosen.append(sum(len(value) for key, value in run.states["lt_sft"].items() if key.startswith("index ")))
    # Six phases of 20 steps end behind steps 3, 7, 10, 13 and 17.
    thirds = [int(0.05 * third / 3 * numbers) for third in range(4)]
    assert chosen == [thirds[(i >= 2) + (i >= 9) + (i >= 16)] for i in range(STEPS)]


def test_the_schedule_begins_anew_with_every_phase() -> None:
    ends = {n: make({"lt_sft": {"iterations": n}}, ("selective",)).values[1].ends for n in (1, 2)}
    assert ends == {1: (0.5,), 2: (0.25, 0.5, 0.75)}
    clock = Clock(20, 1.0, linear, 0, 0, turns=Turns({"lt_sft": Freezing(ends=ends[1], restart=True)}))
    assert [clock.at(step, 0.0).factor for step in (0, 5, 10, 15)] == [1.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize("phase", [0, 1])
def test_the_penalty_pulls_each_moved_number_by_lambda_over_all_numbers(engine: Any, now: Now, phase: int) -> None:
    """It counts once a step, however the step is split, and not at all where a number stands at the base."""
    run = engine({"lt_sft": {"l1": 0.1}}, model=model_of(tied=True, layers=1), optimizer="adamw")
    everything = sum(one.numel() for one in run.tune.model.parameters())
    go(run, now, 0, 10 * phase)
    for name, one in run.tune.trained.items():
        moved = one.start.clone()
        moved.view(-1)[::3] += 0.01
        moved.view(-1)[1::3] -= 0.01
        run.tune.set({name: moved})
    at, batches = now._replace(step=10 * phase), split(rows_of_eight(), (5, 3))
    both = gradients(run, batches, at)
    run.objective.terms = [one for one in run.objective.terms if one.slot != "lt_sft"]
    plain = gradients(run, batches, at)
    assert len(run.objective.terms) == 1
    for name, one in run.tune.trained.items():
        sign = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).repeat(one.numel)[: one.numel].view(one.master.shape)
        assert torch.allclose(both[name] - plain[name], 0.1 / everything * sign, rtol=0, atol=1e-15)


def test_the_penalty_of_a_model_in_bf16_is_of_what_its_masters_hold(engine: Any, now: Now) -> None:
    """The penalty was of the live weights in bf16: numbers that had moved by less than their rounding had none."""
    run = engine({"lt_sft": {"l1": 0.1}}, model=model_of(tied=True, layers=1), optimizer="adamw", dtype=torch.bfloat16)
    everything, loss = sum(one.numel() for one in run.tune.model.parameters()), 0.0
    for name, one in run.tune.trained.items():
        run.tune.set({name: one.start.float() * (1 + 2**-12)})
        loss += 0.1 / everything * float((one.master.detach() - one.start.float()).abs().sum())
    batches = split(rows_of_eight(), (5, 3))
    result = run.step(batches, now._replace(learning_rate=0.0))
    assert result.parts["lt_sft"] == pytest.approx(loss, rel=1e-5)
    # By itself: beside it, rounding of the loss's own gradients in bf16 would be larger than all of it.
    run.objective.terms = [one for one in run.objective.terms if one.slot == "lt_sft"]
    found = gradients(run, batches, now)
    for name, one in run.tune.trained.items():
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name], 0.1 / everything * one.start.float().sign(), rtol=1e-5, atol=0), name


def test_what_is_learnt_shrinks_as_the_penalty_grows(engine: Any, now: Now) -> None:
    sizes = []
    for l1 in (0.0, 10.0, 1000.0):
        run = engine({"lt_sft": {"l1": l1, "share": 0.02}}, model=model_of(layers=1), optimizer="adamw")
        base = weights(run)
        go(run, now, 0, STEPS)
        sizes.append(sum(float((one - base[name]).abs().sum()) for name, one in weights(run).items()))
    assert 0 < sizes[2] < sizes[1] < sizes[0]


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_resumed_in_every_phase(engine: Any, now: Now, tmp_path: Path, architecture: str, iterations: int) -> None:
    def build() -> Any:
        tune = {"lt_sft": {"share": 0.02, "iterations": iterations, "l1": 0.1}}
        run = engine(tune, model=model_of(architecture, layers=1), optimizer={"adamw": {"weight_decay": 0.1}})
        run.tune.model.train()
        return run

    eight = now._replace(steps=8)
    run = build()
    for k in range(8):
        save(tmp_path / f"{k}", run, {})
        go(run, eight, k, k + 1)
    wanted = weights(run)
    for k in range(1, 8):
        fresh = build()
        restore(tmp_path / f"{k}", fresh)
        go(fresh, eight, k, 8)
        assert all(torch.equal(one, wanted[name]) for name, one in weights(fresh).items()), k


def test_deltas_of_a_task_and_a_language_add_up(engine: Any, now: Now) -> None:
    deltas, base = [], model_of()
    for seed in (0, 7):
        run = engine({"lt_sft": {"share": 0.03}}, model=copy.deepcopy(base), optimizer="adamw")
        for i in range(STEPS):
            run.step([rows_of_eight(seed=seed)], now._replace(step=i, learning_rate=0.01))
        deltas.append((Delta.of(run.tune, base), weights(run)))
    (task, with_task), (language, with_language) = deltas
    start = {name: one.detach().clone() for name, one in base.named_parameters()}
    both = {name: one + (with_language[name] - start[name]) for name, one in with_task.items()}
    for one in (task + language, language + task):
        model = copy.deepcopy(base)
        one.apply(model)
        assert all(torch.allclose(p.detach(), both[name], rtol=0, atol=1e-12) for name, p in model.named_parameters())
        one.remove(model)
        assert all(torch.allclose(p.detach(), start[name], rtol=0, atol=1e-12) for name, p in model.named_parameters())
    overlap = count({n: (with_task[n] != one) & (with_language[n] != one) for n, one in start.items()})
    assert overlap > 0


def test_a_tied_embedding_counts_once_and_norms_and_an_untied_head_stand_still(engine: Any) -> None:
    for tied in (True, False):
        run = engine("lt_sft", model=model_of(tied=tied))
        roles = [one.place.role for one in run.tune.trained.values()]
        assert roles.count("embedding") == 1 and "head" not in roles and not any("norm" in role for role in roles)


def test_a_run_that_is_too_short_is_refused(engine: Any) -> None:
    with pytest.raises(LuthierError, match="a run of 20 steps has 20 for `lt_sft`, which are too few for its 22 phases"):
        engine({"lt_sft": {"iterations": 11}})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"share": 0.0}, "share is 0"),
        ({"share": 1.01}, "share is 1"),
        ({"first": 0.0}, "first phase"),
        ({"first": 1.0}, "first phase"),
        ({"iterations": 0}, "iterations"),
        ({"l1": -0.01}, "penalty"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(LuthierError, match=match):
        make({"lt_sft": options}, ("selective",))
