"""Numbers that come and go in mid-run: moments move along, left numbers go back or stay, new ones are young."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Form, Now, Place, Refresh, Select, Selective
from luthier.tune.trained import read
from tests.conftest import split
from tests.toys.helpers import gradients, model_of, rows_of_eight, toys  # noqa: F401

STATE = ("first", "second", "age")


class Script:
    """A selection at one place that changes when the test says so."""

    def __init__(self, form: str, index: list[int], leave: str = "revert", role: str = "mlp_down") -> None:
        self.next: Refresh | None = None
        self.form, self.index, self.leave, self.role = form, index, leave, role

    def value(self) -> Selective:
        def choose(parts: Any, services: Any) -> dict[Place, Select]:
            place = parts.select(roles=[self.role], blocks=[1])[0]
            return {place: Select(self.form, torch.tensor(self.index))}  # type: ignore[arg-type]

        def refresh(state: Any, services: Any) -> dict[Place, Refresh]:
            changed = {} if self.next is None else {services.parts.select(roles=[self.role], blocks=[1])[0]: self.next}
            self.next = None
            return changed

        return Selective(choose, refresh=refresh, leave=self.leave)  # type: ignore[arg-type]


def only(run: Any) -> tuple[Any, dict[str, Tensor]]:
    ((name, one),) = run.tune.trained.items()
    return one, run.chain.state["adamw"][name]


def steps(run: Any, now: Now, first: int, count: int) -> None:
    for i in range(first, first + count):
        run.step(split(rows_of_eight(), (5, 3)), now._replace(step=i, learning_rate=0.01))


def refresh(run: Any, now: Now) -> list[str]:
    return run.tune.refresh(lambda slot: run.services(slot, now), now)  # type: ignore[no-any-return]


@pytest.mark.parametrize("leave", ["revert", "keep"])
@pytest.mark.parametrize("form", ["rows", "cols", "flat"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_stays_keeps_its_moments_and_what_leaves_goes_back_or_stays(
    engine: Any, now: Now, form: Form, leave: str, architecture: str
) -> None:
    model = model_of(architecture)
    script = Script(form, [1, 4, 7, 9], leave)
    run = engine(script.value(), model=model, step="adamw")
    one, state = only(run)
    region = run.tune.region(one.place)
    base = region.clone()
    steps(run, now, 0, 3)
    learnt = region.clone()
    before = {key: state[key].clone() for key in STATE}
    master = one.master.detach().clone()
    script.next = Refresh(torch.tensor([9, 20, 1]), torch.tensor([3, -1, 0]))
    (said,) = refresh(run, now)
    assert "2 of 3 stay" in said
    axis = one.axis
    pick = torch.tensor([3, 0])
    for key in STATE:
        assert torch.equal(state[key].index_select(axis, torch.tensor([0, 2])), before[key].index_select(axis, pick))
        assert not state[key].select(axis, 1).any()
    assert torch.equal(one.master.detach().index_select(axis, torch.tensor([0, 2])), master.index_select(axis, pick))
    left = torch.tensor([4, 7])
    assert torch.equal(read(region, form, left), read(base if leave == "revert" else learnt, form, left))
    assert torch.equal(read(region, form, torch.tensor([20])), read(base, form, torch.tensor([20])))
    assert torch.equal(read(region, form, torch.tensor([9, 1])), read(learnt, form, torch.tensor([9, 1])))
    steps(run, now, 3, 2)
    assert torch.equal(read(region, form, left), read(base if leave == "revert" else learnt, form, left))


def test_everything_left_means_the_base_bit_for_bit_in_bf16_too(engine: Any, now: Now) -> None:
    script = Script("flat", [0, 5, 6])
    run = engine(script.value(), step="adamw", dtype=torch.bfloat16)
    one, _ = only(run)
    base = run.tune.region(one.place).clone()
    steps(run, now, 0, 3)
    assert not torch.equal(run.tune.region(one.place), base)
    script.next = Refresh(torch.tensor([8, 9]), torch.tensor([-1, -1]))
    refresh(run, now)
    assert torch.equal(run.tune.region(one.place), base)


def test_the_first_step_of_a_late_entry_is_that_of_a_fresh_adam(engine: Any, now: Now) -> None:
    script = Script("flat", [1, 4, 7, 9])
    run = engine(script.value(), model=model_of(), step="adamw")
    one, state = only(run)
    steps(run, now, 0, 16)
    script.next = Refresh(torch.tensor([1, 33, 34]), torch.tensor([0, -1, -1]))
    refresh(run, now)
    gradient = next(iter(gradients(run, [rows_of_eight()], now).values()))
    before = one.master.detach().clone()
    fresh = before[1:].clone().requires_grad_(True)
    fresh.grad = gradient[1:].clone()
    torch.optim.AdamW([fresh], lr=0.01, weight_decay=0.0).step()
    run.step([rows_of_eight()], now._replace(step=16, learning_rate=0.01))
    assert torch.allclose(one.master.detach()[1:], fresh.detach(), rtol=0, atol=1e-14)
    assert state["age"].tolist() == [17, 1, 1]


def test_new_entries_may_start_from_a_seed_and_revert_to_the_base_all_the_same(engine: Any, now: Now) -> None:
    script = Script("flat", [1, 4])
    run = engine(script.value(), model=model_of(), step="adamw")
    one, _ = only(run)
    base = run.tune.region(one.place).clone()
    script.next = Refresh(torch.tensor([1, 8]), torch.tensor([0, -1]), torch.tensor([9.0, 0.25], dtype=torch.float64))
    refresh(run, now)
    assert torch.equal(one.master.detach(), base.flatten()[[1, 8]] + torch.tensor([0.0, 0.25], dtype=torch.float64))
    assert run.tune.region(one.place).flatten()[8] == base.flatten()[8] + 0.25
    script.next = Refresh(torch.tensor([2]), torch.tensor([-1]))
    refresh(run, now)
    assert torch.equal(run.tune.region(one.place), base)


def test_the_gradient_follows_to_the_new_entries(engine: Any, now: Now) -> None:
    script = Script("rows", [1, 4])
    run = engine(script.value(), model=model_of(), step="adamw")
    script.next = Refresh(torch.tensor([4, 6, 8]), torch.tensor([1, -1, -1]))
    refresh(run, now)
    found = next(iter(gradients(run, [rows_of_eight()], now).values()))
    fixed = engine(Script("rows", [4, 6, 8]).value(), model=model_of(), step="adamw")
    assert torch.equal(found, next(iter(gradients(fixed, [rows_of_eight()], now).values())))


def test_a_refreshed_selection_must_fit(engine: Any, now: Now) -> None:
    script = Script("flat", [1, 4])
    run = engine(script.value(), step="adamw")
    script.next = Refresh(torch.tensor([4, 4]), torch.tensor([1, -1]))
    with pytest.raises(LuthierError, match="twice"):
        refresh(run, now)


def test_growth_changes_no_output_and_moves_state_along_the_right_axis(engine: Any, now: Now) -> None:
    run = engine({"growing": {"rank": 2, "every": 2}}, model=model_of(), step="adamw")
    steps(run, now, 0, 1)
    run.tune.start_observing(now._replace(step=1))
    gradients(run, [rows_of_eight()], now._replace(step=1))
    for place in {one.place for one in run.tune.trained.values()}:
        run.states["growing"][f"size {place}"] = float(len(str(place)))
    before = {name: (one.master.detach().clone(), dict(run.chain.state["adamw"][name])) for name, one in run.tune.trained.items()}
    loss = run.services("test", now).forward(rows_of_eight(), ["nll"])["nll"]
    said = refresh(run, now._replace(step=1))
    assert len(said) == 4
    assert torch.allclose(run.services("test", now).forward(rows_of_eight(), ["nll"])["nll"], loss, rtol=0, atol=1e-13)
    grown = [name for name, one in run.tune.trained.items() if one.master.shape != before[name][0].shape]
    assert len(grown) == 8
    for name in grown:
        one, (old, old_state) = run.tune.trained[name], before[name]
        axis = 0 if name.endswith("down") else 1
        assert one.master.shape[axis] == 3
        assert torch.equal(one.master.detach().narrow(axis, 0, 2), old)
        for key in STATE:
            state = run.chain.state["adamw"][name][key]
            assert torch.equal(state.narrow(axis, 0, 2), old_state[key]) and not state.narrow(axis, 2, 1).any()
    steps(run, now, 1, 1)
    ages = [run.chain.state["adamw"][name]["age"].flatten().tolist() for name in grown]
    assert ages == [[2.0, 2.0, 1.0]] * 8


def test_growth_goes_where_the_summed_gradient_is_large_whatever_the_split(engine: Any, now: Now) -> None:
    sizes = []
    for cut in ((8,), (3, 4, 1)):
        run = engine("growing", model=model_of(), step="adamw")
        for i in range(4):
            run.step(split(rows_of_eight(), cut), now._replace(step=i, learning_rate=0.01))
        sizes.append({name: tuple(one.master.shape) for name, one in run.tune.trained.items()})
    assert sizes[0] == sizes[1] and len(set(sizes[0].values())) > 2
