"""What stands still: no gradient, no step, no decay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import (
    Callback,
    Freezing,
    Now,
    Optimizer,
    Place,
    Prompt,
    Refresh,
    RepresentationEdit,
    Resize,
    Seen,
    Select,
    Selective,
    WeightDelta,
)
from luthier.models.parts import map_parts
from luthier.registry import Part
from luthier.training.engine import with_context
from luthier.training.loop import Clock
from luthier.training.schedule import linear
from luthier.tune.change import hold_still
from luthier.tune.trained import read, write
from luthier.tune.turns import Turns
from tests.conftest import split
from tests.toys.helpers import gradients, logits_of, model_of, rows_of_eight, toys  # noqa: F401

DOWN = ("mlp_down",)


def part(*values: Any) -> Part:
    return Part(name="probe", kind="any", options={}, values=values)


def choosing(**selects: Any) -> Selective:
    """Selects one place of block 1 by role."""

    def choose(parts: Any, services: Any) -> dict[Place, Select]:
        return {parts.select(target_modules=[role], blocks=[1])[0]: select for role, select in selects.items()}

    return Selective(choose)


def go(run: Any, now: Now, first: int, last: int) -> None:
    for i in range(first, last):
        run.step(split(rows_of_eight(seed=i), (5, 3)), now._replace(step=i, learning_rate=0.01))


def masters(run: Any) -> dict[str, Tensor]:
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("forget", [False, True])
def test_what_stands_still_does_not_move_and_what_moves_moves_as_alone(
    engine: Any, now: Now, forget: bool, dtype: torch.dtype
) -> None:
    still = part(Freezing(lambda trained, state, now: now.step < 3 and "mlp" in trained.name, everywhere=True, forget=forget))
    run = engine("full", freeze=[still], optimizer=[{"adamw": {"weight_decay": 0.1}}], dtype=dtype)
    before = masters(run)
    go(run, now, 0, 3)
    after = masters(run)
    moved = {name for name in before if not torch.equal(before[name].to(dtype), after[name].to(dtype))}
    assert {name for name in before if "mlp" in name} == {name for name in before if "mlp" in name and name not in moved}
    assert moved == {name for name in before if "mlp" not in name}
    has_state = set(run.chain.state["adamw"])
    assert (not any("mlp" in name for name in has_state)) == forget
    # What the model holds is master enough meanwhile.
    still_now = [one for name, one in run.tune.trained.items() if "mlp" in name]
    assert all(one.still and one.forgotten == forget and one.is_live == (forget or dtype == torch.float64) for one in still_now)
    go(run, now, 3, 4)
    assert not any(one.still or one.forgotten for one in still_now)
    assert all(one.master.dtype == torch.promote_types(dtype, torch.float32) for one in still_now)
    assert all(not torch.equal(masters(run)[name], after[name]) for name in before)
    ages = {name: float(run.chain.state["adamw"][name]["age"].max()) for name in before}
    assert {ages[name] for name in ages if "mlp" in name} == {1.0} and {ages[n] for n in ages if "mlp" not in n} == {4.0}


def test_moments_of_what_stands_still_do_not_fade(engine: Any, now: Now) -> None:
    still = part(Freezing(lambda trained, state, now: 1 <= now.step < 3 and "mlp" in trained.name, everywhere=True))
    run = engine("full", freeze=[still], optimizer="adamw")
    go(run, now, 0, 1)
    name = next(name for name in run.tune.trained if "mlp" in name)
    first = run.chain.state["adamw"][name]["first"].clone()
    go(run, now, 1, 3)
    assert torch.equal(run.chain.state["adamw"][name]["first"], first)


def test_no_graph_reaches_below_what_stands_still(engine: Any, now: Now) -> None:
    still = part(Freezing(lambda trained, state, now: trained.place.block != 3, everywhere=True))
    run = engine("full", freeze=[still])
    seen: list[bool] = []
    run.tune.model.get_submodule(run.tune.parts.block_modules[3]).register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].requires_grad)
    )
    run.tune.model.train()
    go(run, now, 0, 1)
    assert seen and not any(seen)


def test_slices_that_stand_still_form_no_gradient(engine: Any, now: Now) -> None:
    still = part(Freezing(lambda trained, state, now: now.step < 1, everywhere=True))
    run = engine("some_rows", freeze=[still])
    before = masters(run)
    go(run, now, 0, 1)
    assert all(torch.equal(values, before[name]) for name, values in masters(run).items())
    go(run, now, 1, 2)
    assert any(not torch.equal(values, before[name]) for name, values in masters(run).items())


def test_a_technique_freezes_its_own_tensors_alone(engine: Any, now: Now) -> None:
    lora_like = part(
        WeightDelta(
            lambda place, weight_OI, services: {"down": torch.ones(2, weight_OI.shape[1]), "up": torch.zeros(len(weight_OI), 2)},
            lambda tensors, x: x @ tensors["down"].T @ tensors["up"].T,
            lambda tensors: tensors["up"] @ tensors["down"],
            target_modules=DOWN,
        ),
        Freezing(lambda trained, state, now: True),
    )
    run = engine([lora_like, "some_rows"])
    before = masters(run)
    go(run, now, 0, 1)
    moved = {run.tune.trained[name].slot for name, values in masters(run).items() if not torch.equal(values, before[name])}
    assert moved == {"some_rows"}


def test_the_schedule_begins_again() -> None:
    clock = Clock(20, 1.0, linear, 4, 0, turns=Turns({"still": Freezing(ends=(0.5,), restart=True)}))
    factors = [clock.factor(step) for step in range(20)]
    assert factors[:10] == factors[10:]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[9] == pytest.approx(1 / 8)
    plain = Clock(20, 1.0, linear, 4, 0)
    assert [plain.factor(step) for step in (0, 3, 4, 12)] == [0.25, 1.0, 1.0, 0.5]
    assert [Now(step=step, steps=10).phase((0.25, 0.5)) for step in (0, 1, 2, 4, 5, 9)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["whole", "rows", "flat"])
def test_a_selection_may_begin_elsewhere(engine: Any, now: Now, form: str, architecture: str) -> None:
    model = model_of(architecture)
    batch, wanted = rows_of_eight(), logits_of(copy.deepcopy(model), rows_of_eight())
    index = None if form == "whole" else torch.tensor([1, 3])
    place = map_parts(model).select(target_modules=DOWN, blocks=[1])[0]
    shape = map_parts(model).view(model, place).shape
    start = torch.full({"whole": shape, "rows": (2, shape[1]), "flat": (2,)}[form], 0.25, dtype=torch.float64)
    run = engine([part(choosing(mlp_down=Select(form, index, start=start)))], model=model, keep_base=True)  # type: ignore[arg-type]
    ((_, one),) = run.tune.trained.items()
    live = run.tune.region(place)
    selected = {"whole": live, "rows": live[index], "flat": live.reshape(-1)[index]}[form]
    assert torch.equal(selected, start)
    assert (one.master == 0.25).all() and float((logits_of(model, batch) - wanted).abs().max()) > 0
    with run.tune.off():
        assert torch.equal(logits_of(model, batch), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["whole", "rows", "flat"])
def test_a_selection_that_begins_elsewhere_and_a_delta_taken_out_of_the_same_weight_know_the_base(
    engine: Any, form: str, architecture: str, dtype: torch.dtype
) -> None:
    model = model_of(architecture).to(dtype)
    place = map_parts(model).select(target_modules=DOWN, blocks=[1])[0]
    base_OI = map_parts(model).view(model, place).clone()
    index = None if form == "whole" else torch.tensor([1, 35])
    if form == "rows":
        index = torch.tensor([1, 3])
    start = torch.full_like(read(base_OI, form, index), 0.25)  # type: ignore[arg-type]
    select = Select(form, index, start=start)  # type: ignore[arg-type]
    tunes = [part(choosing(mlp_down=select)), {"svd_start": {"target_modules": ["mlp_down"]}}]
    tune = engine(tunes, model=model, dtype=dtype, keep_base=True).tune
    (addition,) = tune.site(place.module).additions
    delta_OI = addition.value.delta(addition.masters())
    begun_OI = base_OI.clone()
    write(begun_OI, form, index, start)  # type: ignore[arg-type]
    taken_OI = (begun_OI.to(delta_OI.dtype) - delta_OI).to(dtype)
    assert torch.equal(tune.region(place), taken_OI)
    # What trains goes on from there: its first step writes nothing back.
    (one,) = (one for one in tune.trained.values() if one.place == place and one.form == form)
    held = one.master.t() if form == "whole" and architecture == "gpt2" else one.master
    assert torch.equal(held.to(dtype), read(taken_OI, form, index))  # type: ignore[arg-type]
    with tune.off():
        assert torch.equal(tune.region(place), base_OI)
    assert torch.equal(tune.region(place), taken_OI)


def test_a_checkpoints_still_tensor_is_still(engine: Any) -> None:
    tune = engine("full", model=model_of(layers=1), dtype=torch.bfloat16).tune
    (kept, gone, other), left = list(tune.trained.values())[:3], []
    tune.left = left.append
    hold_still(tune, kept.name, forget=False)
    hold_still(tune, gone.name, forget=True)
    assert [one.still for one in (kept, gone, other)] == [True, True, False] and left == [gone]
    assert [one.leaf.requires_grad for one in (kept, gone, other)] == [False, False, True]
    assert [one.is_live for one in (kept, gone, other)] == [False, True, False] and gone.forgotten and not kept.forgotten


def test_decay_pulls_to_the_start(engine: Any, now: Now) -> None:
    """By hand: w = 3 at the start, 3.5 now, rate 0.1, decay 0.1, no gradient: 3.495; to zero it would be 3.465."""
    for decay, wanted in (("start", 3.495), ("zero", 3.465)):
        select = Select("flat", torch.tensor([0]), decay=decay)  # type: ignore[arg-type]
        model = model_of()
        place = map_parts(model).select(target_modules=DOWN, blocks=[1])[0]
        map_parts(model).view(model, place).data[0, 0] = 3.0
        run = engine([part(choosing(mlp_down=select))], model=model, optimizer=[{"adamw": {"weight_decay": 0.1}}])
        ((name, one),) = run.tune.trained.items()
        run.tune.set({name: torch.tensor([3.5], dtype=torch.float64)})
        one.gradient = torch.zeros(1, dtype=torch.float64)
        run.chain.step(now._replace(learning_rate=0.1))
        assert float(one.master.detach()) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_from_whole_to_entries_everything_is_new(engine: Any, now: Now, architecture: str, dtype: torch.dtype) -> None:
    def refresh(state: Any, services: Any) -> dict[Place, Refresh]:
        if services.now.step != 1:
            return {}
        place = services.parts.select(target_modules=DOWN, blocks=[1])[0]
        return {place: Refresh(torch.tensor([0, 5, 7]), torch.full((3,), -1), form="flat")}

    value = choosing(mlp_down=Select("whole"), attention_output=Select("whole"))._replace(refresh=refresh)
    model = model_of(architecture).to(dtype)
    base = copy.deepcopy(model)
    run = engine([part(value)], model=model, optimizer="adamw", dtype=dtype)
    place = run.tune.parts.select(target_modules=DOWN, blocks=[1])[0]
    go(run, now, 0, 1)
    run.tune.snapshot("whole")
    held = run.tune.region(place).clone()
    go(run, now, 1, 2)
    one = run.tune.trained[f"probe/{place}"]
    assert one.form == "flat" and one.numel == 3
    assert torch.equal(run.tune.region(place), map_parts(base).view(base, place).data)
    assert {key: value.numel() for key, value in run.chain.state["adamw"][one.name].items()} == {"first": 3, "second": 3, "age": 3}
    assert not run.chain.state["adamw"][one.name]["age"].any()
    go(run, now, 2, 5)
    changed = (run.tune.region(place) != map_parts(base).view(base, place).data).reshape(-1).nonzero()[:, 0].tolist()
    assert changed == [0, 5, 7]
    run.tune.go_back("whole")
    assert one.form == "whole" and torch.equal(run.tune.region(place), held)


def test_newcomers_begin_with_what_was_seen_of_their_gradients(engine: Any, now: Now) -> None:
    told: list[Any] = []

    def refresh(state: Any, services: Any) -> dict[Place, Refresh]:
        place = services.parts.select(target_modules=DOWN, blocks=[1])[0]
        mean = torch.tensor([2.0, 2.0], dtype=torch.float64)
        return {place: Refresh(torch.tensor([3, 9]), torch.tensor([1, -1]), seen=Seen(mean, mean * 2, 5.0))}

    def init(trained: Any) -> dict[str, Any]:
        return {"moment": torch.zeros_like(trained.master.detach())}

    def seed(state: Any, is_new: Tensor, seen: Seen) -> None:
        told.append((is_new.tolist(), seen.steps))
        state["moment"] = torch.where(is_new, seen.mean, state["moment"])

    optimizer = part(Optimizer(init, lambda value, gradient, state, trained, now: state["moment"].copy_(gradient), seed=seed))
    run = engine([part(choosing(mlp_down=Select("flat", torch.tensor([1, 3])))._replace(refresh=refresh))], optimizer=[optimizer])
    go(run, now, 0, 1)
    assert told == [([False, True], 5.0)]
    ((_, state),) = run.chain.state["probe.2"].items()
    assert float(state["moment"][1]) == 2.0 and float(state["moment"][0]) != 2.0


def test_a_transform_may_skip_a_tensor_and_one_of_a_technique_sees_its_own_alone(engine: Any, now: Now) -> None:
    from luthier.kinds import GradientTransform

    seen: set[str] = set()

    def update(value: Tensor, state: Any, trained: Any, now: Now) -> Tensor | None:
        seen.add(trained.slot)
        return None if now.step == 0 else value

    mine = part(choosing(mlp_down=Select("rows", torch.tensor([0]))), GradientTransform(lambda trained: {}, update))
    run = engine([mine, {"lora": {"target_modules": ["attention"]}}], optimizer="adamw")
    before = masters(run)
    go(run, now, 0, 1)
    (name,) = (name for name in before if name.startswith("probe/"))
    assert seen == {"probe"} and torch.equal(masters(run)[name], before[name])
    assert float(run.chain.state["adamw"][name]["age"]) == 0
    go(run, now, 1, 2)
    assert not torch.equal(masters(run)[name], before[name])


def test_a_callback_sees_the_gradient_that_the_optimizer_got(engine: Any, now: Now) -> None:
    seen: dict[str, Tensor] = {}

    def after_step(state: Any, services: Any) -> None:
        seen.update({one.name: one.gradient.clone() for one in services.trained() if one.gradient is not None})

    callback = part(Callback(after_step, needs=frozenset({"gradients"})))
    run = engine("some_rows", optimizer=[{"clip": {"norm": 1e-3}}, "adamw"], callbacks=[callback])
    go(run, now, 0, 1)
    assert seen.keys() == run.tune.trained.keys()
    assert float(torch.cat([one.reshape(-1) for one in seen.values()]).norm()) == pytest.approx(1e-3)
    assert all(one.gradient is None for one in run.tune.trained.values())


def test_frozen_and_shared_tensors_of_a_delta(engine: Any, now: Now) -> None:
    def start(place: Place, weight_OI: Tensor, services: Any) -> dict[str, Tensor]:
        return {"basis": torch.ones(len(weight_OI), 2), "seed": torch.tensor(7), "own": torch.zeros(2, weight_OI.shape[1])}

    def delta(tensors: dict[str, Tensor]) -> Tensor:
        assert tensors["seed"].dtype == torch.int64
        return (tensors["basis"] * tensors["all"]) @ tensors["own"]

    value = WeightDelta(
        start,
        lambda tensors, x: x @ delta(tensors).T,
        delta,
        target_modules=DOWN,
        frozen=frozenset({"basis", "seed"}),
        shared=lambda places, services: {"all": torch.ones(2)},
        factors=lambda tensors: (tensors["own"], tensors["basis"] * tensors["all"]),
    )
    run = engine([part(value)], optimizer="adamw")
    names = set(run.tune.trained)
    assert {name.rpartition(".")[2] for name in names} == {"own", "all"} and "probe.all" in names
    go(run, now, 0, 3)
    found = gradients(run, [rows_of_eight()], now)
    assert found["probe.all"].abs().sum() > 0
    from luthier.delta import Delta
    from luthier.delta.forms import LowRank

    kept = Delta.of(run.tune)
    assert all(isinstance(form, LowRank) and form.up_OR.shape[1] == 2 for forms in kept.changes.values() for form in forms)
    place = run.tune.parts.select(target_modules=DOWN)[0]
    own = next(one for one in run.tune.owns if one.place == place)
    assert torch.allclose(kept.spread(place.parameter), delta(own.masters()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_an_edit_of_what_a_map_reads_is_the_weight_times_it(engine: Any, now: Now, architecture: str) -> None:
    scale = RepresentationEdit(
        lambda place, width_in, width_out, services: {"scale": torch.full((width_in,), 0.5)},
        lambda tensors, x, y: y * tensors["scale"],
        target_modules=DOWN,
        of="input",
    )
    model = model_of(architecture)
    by_hand = copy.deepcopy(model)
    parts = map_parts(by_hand)
    for place in parts.select(target_modules=DOWN):
        parts.view(by_hand, place).data.mul_(0.5)
    run = engine([part(scale)], model=model)
    batch = rows_of_eight()
    assert torch.allclose(logits_of(model, batch), logits_of(by_hand, batch), atol=1e-12)
    with run.tune.off():
        assert not torch.allclose(logits_of(model, batch), logits_of(by_hand, batch), atol=1e-6)
    # A tap beside it sees what the map read.
    both = engine([part(scale), "some_cols"], model=model_of(architecture))
    assert all(value.isfinite().all() for value in gradients(both, [batch], now).values())


@pytest.mark.parametrize("role", ["attention_layer", "mlp_layer"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_sub_layers_are_edited_between_their_input_and_output(engine: Any, now: Now, architecture: str, role: str) -> None:
    seen: list[tuple[torch.Size, torch.Size]] = []

    def apply(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.shape, y.shape))
        return y + x * tensors["gate"]

    value = RepresentationEdit(lambda place, i, o, services: {"gate": torch.zeros(i)}, apply, target_modules=(role,))
    model = model_of(architecture)
    wanted = logits_of(copy.deepcopy(model), rows_of_eight())
    run = engine([part(value)], model=model)
    assert torch.equal(logits_of(model, rows_of_eight()), wanted)
    assert len(seen) == 2 and len(run.tune.trained) == 2
    assert all(x == y and x[-1] == run.tune.parts.width for x, y in seen)
    assert all(value.abs().sum() > 0 for value in gradients(run, [rows_of_eight()], now).values())


def test_a_model_without_such_a_module_is_refused(engine: Any) -> None:
    value = RepresentationEdit(
        lambda place, i, o, services: {"gate": torch.zeros(i)}, lambda t, x, y: y, target_modules=("mlp_layer",)
    )
    with pytest.raises(LuthierError, match="no module of its own"):
        engine([part(value)], model=model_of("opt"))


def test_the_tensors_of_an_edit_may_be_exchanged(engine: Any, now: Now) -> None:
    def refresh(state: Any, services: Any) -> dict[Place, Resize]:
        if services.now.step != 1:
            return {}
        places = services.parts.select(target_modules=DOWN)
        return {places[0]: Resize({"shift": torch.zeros(services.parts.width)}), **{place: Resize({}) for place in places[1:]}}

    def apply(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return y * tensors["scale"] if "scale" in tensors else y + tensors["shift"]

    value = RepresentationEdit(lambda place, i, o, services: {"scale": torch.ones(o)}, apply, target_modules=DOWN, refresh=refresh)
    model = model_of()
    run = engine([part(value)], model=model, optimizer="adamw")
    go(run, now, 0, 1)
    assert len(run.tune.trained) == 2
    run.tune.snapshot("scales")
    scaled = logits_of(model, rows_of_eight())
    go(run, now, 1, 2)
    (name,) = run.tune.trained
    assert name.endswith("shift") and set(run.chain.state["adamw"]) == {name}
    go(run, now, 2, 3)
    assert float(run.tune.trained[name].master.detach().abs().sum()) > 0
    run.tune.go_back("scales")
    assert len(run.tune.trained) == 2 and torch.equal(logits_of(model, rows_of_eight()), scaled)


def test_virtual_tokens_with_targets_are_learnt(engine: Any, now: Now) -> None:
    labels = torch.tensor([-100, 9, 11])

    def start(table_VD: Tensor, services: Any) -> dict[str, Tensor]:
        return {"prompt": table_VD[[8, 9, 11]].clone()}

    def apply(tensors: dict[str, Tensor], ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
        virtual = torch.nn.functional.embedding((-1 - ids_BT).clamp(min=0, max=2), tensors["prompt"])
        return torch.where((ids_BT < 0)[..., None], virtual, embeds_BTD)

    learnt = engine([part(Prompt(start, apply, labels=lambda services: labels))])
    assert learnt.tune.prompt_length == 3
    # The same as rows that begin with these very tokens and have these targets.
    batch = rows_of_eight()
    rows = len(batch.row_ids)
    spelled = batch._replace(
        token_ids_BT=torch.cat([torch.tensor([[8, 9, 11]]).expand(rows, -1), batch.token_ids_BT], 1),
        attend_BT=torch.cat([torch.ones(rows, 3, dtype=torch.bool), batch.attend_BT], 1),
        position_BT=torch.cat([torch.arange(3).expand(rows, -1), batch.position_BT + 3], 1),
        label_BT=torch.cat([labels.expand(rows, -1), batch.label_BT], 1),
    )
    told = learnt.step([batch], now)
    plain = engine("full").step([spelled], now)
    assert told.supervised == plain.supervised == batch.supervised + 2 * rows
    assert told.loss == pytest.approx(plain.loss, abs=1e-12)
    joined = with_context(batch, labels)
    assert joined.token_ids_BT[0, :4].tolist()[:3] == [-1, -2, -3] and joined.position_BT[0, 3] == 3
