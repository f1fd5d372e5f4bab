"""Numbers that come and go in mid-run: moments move along, left numbers go back or stay, new ones are young."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds import Form, Now, Place, Refresh, Resize, Select, Selective, WeightDelta
from luthier.registry import Part
from luthier.tune.trained import read, write
from tests.conftest import split
from tests.toys.helpers import gradients, model_of, plain_gradients, rows_of_eight, toys  # noqa: F401

STATE = ("first", "second", "age")


class Script:
    """A selection at one place that changes when the test says so."""

    def __init__(self, form: str, index: list[int], leave: str = "revert", role: str = "mlp_down") -> None:
        self.next: Refresh | None = None
        self.form, self.index, self.leave, self.role = form, index, leave, role

    def value(self) -> Selective:
        def choose(parts: Any, services: Any) -> dict[Place, Select]:
            place = parts.select(target_modules=[self.role], blocks=[1])[0]
            return {place: Select(self.form, torch.tensor(self.index))}  # type: ignore[arg-type]

        def refresh(state: Any, services: Any) -> dict[Place, Refresh]:
            changed = {} if self.next is None else {services.parts.select(target_modules=[self.role], blocks=[1])[0]: self.next}
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
    run = engine(script.value(), model=model, optimizer="adamw")
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
    run = engine(script.value(), optimizer="adamw", dtype=torch.bfloat16)
    one, _ = only(run)
    base = run.tune.region(one.place).clone()
    steps(run, now, 0, 3)
    assert not torch.equal(run.tune.region(one.place), base)
    script.next = Refresh(torch.tensor([8, 9]), torch.tensor([-1, -1]))
    refresh(run, now)
    assert torch.equal(run.tune.region(one.place), base)


def test_the_first_step_of_a_late_entry_is_that_of_a_fresh_adam(engine: Any, now: Now) -> None:
    script = Script("flat", [1, 4, 7, 9])
    run = engine(script.value(), model=model_of(), optimizer="adamw")
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
    run = engine(script.value(), model=model_of(), optimizer="adamw")
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
    run = engine(script.value(), model=model_of(), optimizer="adamw")
    script.next = Refresh(torch.tensor([4, 6, 8]), torch.tensor([1, -1, -1]))
    refresh(run, now)
    found = next(iter(gradients(run, [rows_of_eight()], now).values()))
    fixed = engine(Script("rows", [4, 6, 8]).value(), model=model_of(), optimizer="adamw")
    assert torch.equal(found, next(iter(gradients(fixed, [rows_of_eight()], now).values())))


@pytest.mark.parametrize(("form", "index"), [("rows", [3, 1]), ("cols", [2, 0])])
def test_another_form_begins_anew_from_its_seed(engine: Any, now: Now, form: Form, index: list[int]) -> None:
    script, at = Script("flat", [1, 4]), torch.tensor(index)
    run = engine(script.value(), model=model_of(), optimizer="adamw")
    one, _ = only(run)
    base = run.tune.region(one.place).clone()
    steps(run, now, 0, 2)
    seed = torch.full(read(base, form, at).shape, 0.25, dtype=torch.float64)
    script.next = Refresh(at, torch.tensor([-1, -1]), seed, form)
    (said,) = refresh(run, now)
    assert f"2 {form} of" in said and one.axis == int(form == "cols")
    begun = base.clone()
    write(begun, form, at, read(base, form, at) + 0.25)
    assert torch.equal(run.tune.region(one.place), begun) and torch.equal(one.master, read(begun, form, at))
    fixed = engine(Script(form, index).value(), model=model_of())
    fixed.tune.set({name: other.master + 0.25 for name, other in fixed.tune.trained.items()})
    (found,), (expected,) = (gradients(each, [rows_of_eight()], now).values() for each in (run, fixed))
    assert torch.equal(found, expected)
    steps(run, now, 2, 1)
    script.next = Refresh(torch.tensor([5]), torch.tensor([-1]), form="flat")
    refresh(run, now)
    assert torch.equal(run.tune.region(one.place), base) and one.axis == 0
    steps(run, now, 3, 1)
    script.next = Refresh(torch.tensor([6]), torch.tensor([-1]))
    refresh(run, now)
    assert torch.equal(run.tune.region(one.place), base)


def test_a_whole_tensor_may_give_way_to_entries_and_come_back(engine: Any, now: Now) -> None:
    coming: list[Refresh] = []

    def place_of(parts: Any) -> Place:
        return parts.select(target_modules=["mlp_down"], blocks=[1])[0]  # type: ignore[no-any-return]

    value = Selective(
        lambda parts, services: {place_of(parts): Select("whole")},
        refresh=lambda state, services: {place_of(services.parts): coming.pop()} if coming else {},
    )
    run = engine(value, model=model_of(), optimizer="adamw")
    ((name, one),) = run.tune.trained.items()
    live = run.tune.model.get_parameter(one.place.parameter)
    base = live.detach().clone()
    steps(run, now, 0, 2)
    learnt = live.detach().clone()
    run.tune.snapshot("whole")
    coming.append(Refresh(torch.tensor([5, 0]), torch.tensor([-1, -1]), form="flat"))
    refresh(run, now)
    assert torch.equal(live, base) and not live.requires_grad and one.master.numel() == 2
    steps(run, now, 2, 1)
    assert (live != base).flatten().nonzero().flatten().tolist() == [0, 5] and live.grad is None
    run.tune.go_back("whole")
    assert torch.equal(live, learnt) and one.leaf is live and live.requires_grad
    assert (one.form, one.index, one.axis) == ("whole", None, 0)
    found = gradients(run, [rows_of_eight()], now)[name]
    assert found.shape == live.shape and bool(found.any())


@pytest.mark.parametrize("take", [[0, -1], [-1, 1]])
def test_entries_of_one_form_do_not_go_on_in_another(engine: Any, now: Now, take: list[int]) -> None:
    script = Script("flat", [1, 4])
    run = engine(script.value(), optimizer="adamw")
    script.next = Refresh(torch.tensor([2, 0]), torch.tensor(take), form="rows")
    with pytest.raises(LuthierError, match="continues entries in another form"):
        refresh(run, now)


def test_a_place_may_get_other_tensors_which_are_its_own(engine: Any, now: Now) -> None:
    """Both places are given the very same ones, with a graph of their own: some new, some longer, some with other values."""
    begin = {"mix": torch.tensor([[1.0], [2.0]]), "scale": torch.ones(2), "gone": torch.zeros(1)}
    given = {
        "mix": nn.Parameter(torch.tensor([[2.0], [5.0], [6.0]], dtype=torch.float64)),
        "scale": nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64)),
        "fresh": nn.Parameter(torch.tensor([0.5], dtype=torch.float64)),
    }

    def total(tensors: dict[str, Tensor]) -> Tensor:
        return sum(values.sum() for values in tensors.values())  # type: ignore[return-value]

    def grow(state: Any, services: Any) -> dict[Place, Resize]:
        take = {"mix": torch.tensor([1, -1, -1])}
        return {place: Resize(given, take) for place in services.parts.select(target_modules=["mlp_down"])}  # type: ignore[arg-type]

    value = WeightDelta(
        lambda place, weight_OI, services: begin,
        lambda tensors, x: 0.01 * total(tensors) * x.mean(-1, keepdim=True),
        total,
        target_modules=("mlp_down",),
        refresh=grow,
    )
    run = engine([Part(name="probe", kind="any", options={}, values=(value,))], model=model_of(), optimizer="adamw")
    run.tune.snapshot("before")
    told: list[tuple[str, Any]] = []
    run.tune.moved = lambda one, take, old_size: told.append((one.name.rpartition(".")[2], (take.tolist(), old_size)))
    run.tune.renewed = lambda one: told.append((one.name.rpartition(".")[2], "renewed"))
    run.tune.left = lambda one: told.append((one.name.rpartition(".")[2], "left"))
    assert len(refresh(run, now)) == 2
    each = [("gone", "left"), ("mix", ([1, -1, -1], 2)), ("scale", "renewed"), ("fresh", "renewed")]
    assert told == each * 2
    found = gradients(run, [rows_of_eight()], now)
    assert found.keys() == run.tune.trained.keys() and len(found) == 6 and all(bool(one.any()) for one in found.values())
    for name, one in run.tune.trained.items():
        assert torch.equal(one.master, given[name.rpartition(".")[2]]) and one.changes
    names = set(run.tune.trained)
    with run.tune.at("before"):
        assert {name.rpartition(".")[2]: one.master.tolist() for name, one in run.tune.trained.items()} == {
            name: values.tolist() for name, values in begin.items()
        }
    assert set(run.tune.trained) == names
    first = next(name for name in names if name.endswith("scale"))
    run.tune.set({first: torch.zeros(2, dtype=torch.float64)})
    scales = {name: one.master.tolist() for name, one in run.tune.trained.items() if name.endswith("scale")}
    assert scales.pop(first) == [0.0, 0.0] and list(scales.values()) == [[3.0, 4.0]] == [given["scale"].tolist()]


@pytest.mark.parametrize("form", ["whole", "rows"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_observers_see_the_gradient_that_optimizers_received(engine: Any, now: Now, architecture: str, form: Form) -> None:
    """That of all numbers of a place, [O, I] however it is stored, scaled as its own technique's numbers were and no other's."""
    model, batch, seen, asked = model_of(architecture), rows_of_eight(), [], []
    select = Select(form, None if form == "whole" else torch.tensor([0, 2]))  # type: ignore[arg-type]
    value = Selective(
        lambda parts, services: dict.fromkeys(parts.select(target_modules=["mlp_down"]), select),
        lambda state, place, gradient_OI: seen.append((place, gradient_OI)),  # type: ignore[func-returns-value]
    )
    full = plain_gradients(model, batch)
    tunes = [Part(name="probe", kind="any", options={}, values=(value,)), {"lora": {"target_modules": ["mlp_down"], "rank": 2}}]
    tune = (run := engine(tunes, model=model)).tune
    tune.start_observing(now)
    assert tune.observed() == [name for name in tune.trained if name.startswith("probe")]
    units = [(float(batch.supervised),)]
    for first, some in enumerate(split(batch, (5, 3))):
        sums = run.objective.total(tune, some, units, now, first=not first, services_of=lambda slot: run.services(slot, now))
        sums.loss.backward()

    def factor(names: Any) -> float:
        asked.append(list(names))
        return 0.5

    received = {name: 0.5 * one.gradient for name, one in tune.trained.items() if one.form == "whole"}
    tune.observe(lambda values: values, received, factor)
    assert len(seen) == 2 and asked == ([] if form == "whole" else [[f"probe/{place}"] for place, _ in seen])
    for place, gradient_OI in seen:
        expected = full[place.parameter]
        torch.testing.assert_close(gradient_OI, 0.5 * (expected.t() if architecture == "gpt2" else expected), rtol=1e-9, atol=1e-12)


def test_a_refreshed_selection_must_fit(engine: Any, now: Now) -> None:
    script = Script("flat", [1, 4])
    run = engine(script.value(), optimizer="adamw")
    script.next = Refresh(torch.tensor([4, 4]), torch.tensor([1, -1]))
    with pytest.raises(LuthierError, match="twice"):
        refresh(run, now)


def test_growth_changes_no_output_and_moves_state_along_the_right_axis(engine: Any, now: Now) -> None:
    run = engine({"growing": {"rank": 2, "every": 2}}, model=model_of(), optimizer="adamw")
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
        run = engine("growing", model=model_of(), optimizer="adamw")
        for i in range(4):
            run.step(split(rows_of_eight(), cut), now._replace(step=i, learning_rate=0.01))
        sizes.append({name: tuple(one.master.shape) for name, one in run.tune.trained.items()})
    assert sizes[0] == sizes[1] and len(set(sizes[0].values())) > 2
