"""Gradients of slices: exactly what autograd gives the whole tensor, at the index, and nothing for anything else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Select, Selective
from luthier.models.parts import map_parts
from luthier.tune.taps import TapSpec, tap
from luthier.tune.trained import region
from tests.conftest import make_batch
from tests.tolerance import TINY, assert_rounded
from tests.toys.helpers import gap, gradients, model_of, plain_gradients, rows_of_eight, toys  # noqa: F401

RNG = torch.Generator().manual_seed(5)


def slices(parts: Any, form: str, roles: tuple[str, ...], tensor: str | None = "weight") -> Selective:
    """A selection of a random third of every place."""

    def choose(parts: Any, services: Any) -> dict[Place, Select]:
        chosen = {}
        for place in parts.select(roles, tensor=tensor):
            values = services.weight(place)
            size = {"rows": values.shape[0], "cols": values.shape[-1], "flat": values.numel()}[form]
            index = torch.randperm(size, generator=torch.Generator().manual_seed(size))[: max(2, size // 3)]
            chosen[place] = Select(form, index)  # type: ignore[arg-type]
        return chosen

    return Selective(choose)


def expected(model: Any, one: Any, full: dict[str, Tensor]) -> Tensor:
    """The gradient of a slice, taken from the whole tensor's."""
    parts = map_parts(model)
    shadow = copy.deepcopy(model)
    shadow.get_parameter(one.place.parameter).data.copy_(full[one.place.parameter])
    dense = region(shadow, one.place, parts.transposed)
    if one.form == "rows" or dense.ndim == 1:
        return dense[one.index]
    return dense[:, one.index] if one.form == "cols" else dense.reshape(-1)[one.index]


@pytest.mark.parametrize("form", ["rows", "cols", "flat"])
@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("phi3", False), ("gemma2", True)]
)
def test_slices_get_autograds_gradient(engine: Any, now: Any, form: str, architecture: str, tied: bool) -> None:
    model = model_of(architecture, tied=tied)
    roles = ("linear", "embedding", "head")
    batch = rows_of_eight()
    full = plain_gradients(model, batch)
    run = engine(slices(map_parts(model), form, roles), model=copy.deepcopy(model))
    found = gradients(run, [batch], now)
    assert found.keys() == run.tune.trained.keys()
    # Fused optimizers walk memory, also where the weight is stored the other way round.
    assert all(one.master.is_contiguous() for one in run.tune.trained.values())
    wanted = {name: expected(model, one, full) for name, one in run.tune.trained.items()}
    assert gap(found, wanted) < 1e-10
    assert all(one.grad is None and not one.requires_grad for one in run.tune.model.parameters())


@pytest.mark.parametrize("form", ["rows", "flat"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gpt_neox"])
def test_slices_of_biases(engine: Any, now: Any, form: str, architecture: str) -> None:
    model = model_of(architecture)
    batch = rows_of_eight()
    full = plain_gradients(model, batch)
    run = engine(slices(map_parts(model), form, ("linear",), "bias"), model=copy.deepcopy(model))
    found = gradients(run, [batch], now)
    assert len(found) > 0
    # A key's bias adds one number to all scores of a query: its gradient is zero but for rounding.
    keys = [name for name in found if "attention_key" in run.tune.trained[name].place.role]
    wanted = {name: expected(model, one, full) for name, one in run.tune.trained.items()}
    assert all((found.pop(name) - wanted.pop(name)).abs().max() < 1e-15 for name in keys)
    assert gap(found, wanted) < 1e-10


def test_gradients_of_an_embeddings_rows_by_hand() -> None:
    """Token 0 stands twice, a virtual one between; rows are scaled by 2."""
    ids_BT, slope_BTD = torch.tensor([[0, 2, 1, 0, -1, 3]]), torch.arange(1.0, 13.0).view(1, 6, 2)
    table = [[16.0, 20.0], [10.0, 12.0], [6.0, 8.0], [22.0, 24.0]]

    def gradient(spec: TapSpec, *shape: int) -> Any:
        y, leaf = torch.zeros(1, 6, 2, requires_grad=True), torch.zeros(shape, requires_grad=True)
        tap(y, ids_BT, leaf, spec._replace(of="embedding", rows=4, scale=2.0)).backward(slope_BTD)
        assert y.grad is not None and torch.equal(y.grad, slope_BTD) and leaf.grad is not None
        return leaf.grad.tolist()

    assert gradient(TapSpec("rows", torch.tensor([2, 0])), 2, 2) == [table[2], table[0]]
    assert gradient(TapSpec("rows", torch.tensor([0, 3])), 2, 2) == [table[0], table[3]]
    assert gradient(TapSpec("cols", torch.tensor([1])), 4, 1) == [[20.0], [12.0], [8.0], [24.0]]
    assert gradient(TapSpec("flat", torch.tensor([0, 3, 6])), 3) == [16.0, 12.0, 22.0]
    # The row of a padding token gets nothing, and the others what they get without one.
    assert gradient(TapSpec("rows", torch.tensor([0, 1]), padding=0), 2, 2) == [[0.0, 0.0], table[1]]
    assert gradient(TapSpec("flat", torch.tensor([0, 3, 6]), padding=3), 3) == [16.0, 12.0, 0.0]
    whole: list[Tensor] = []
    assert gradient(TapSpec("whole", None, collect=whole.append), 0) == [] and whole[0].tolist() == table


def test_the_padding_row_of_an_embedding_gets_no_gradient_as_in_pytorch(engine: Any, now: Any) -> None:
    model = model_of(tied=False)
    batch = make_batch([(6, 5)])
    batch.token_ids_BT[0, 2] = model.model.embed_tokens.padding_idx
    full = plain_gradients(model, batch)
    run = engine(slices(map_parts(model), "flat", ("embedding",)), model=copy.deepcopy(model))
    assert gap(gradients(run, [batch], now), {n: expected(model, o, full) for n, o in run.tune.trained.items()}) < 1e-10


def test_a_tap_sees_what_the_weight_gave_not_what_an_edit_made_of_it(engine: Any, now: Any) -> None:
    """A slice and an edit at one module: the slice's gradient goes through the edit, as autograd's does."""
    model, batch = model_of("gpt2"), rows_of_eight()
    run = engine([{"some_rows": {"target_modules": ["mlp_down"]}}, {"scale_shift": {"target_modules": ["mlp_down"]}}], model=model)
    for one in run.tune.trained.values():
        if one.name.endswith("scale"):
            one.master.data.mul_(torch.linspace(0.5, 2.0, one.master.numel()))
    found = gradients(run, [batch], now)
    name = next(n for n in found if n.startswith("some_rows") and n.endswith("weight"))
    one = run.tune.trained[name]
    step, index = 1e-6, (3, 5)
    losses = []
    for side in (step, -step):
        value = one.master.detach().clone()
        value[index] += side
        before = one.master.detach().clone()
        run.tune.set({name: value})
        losses.append(
            run.objective.total(
                run.tune, batch, [(float(batch.supervised),)], now, first=True, services_of=lambda s: run.services(s, now)
            ).loss.item()
        )
        run.tune.set({name: before})
    assert abs((losses[0] - losses[1]) / (2 * step) - float(found[name][index])) < 1e-8


def test_an_edit_on_one_part_of_a_fused_projection_changes_that_part_only(engine: Any) -> None:
    run = engine({"scale_shift": {"target_modules": ["attention_key"]}}, architecture="gpt2")
    module = run.tune.model.get_submodule("transformer.h.0.attn.c_attn")
    x = torch.randn(3, 32, dtype=torch.float64, generator=RNG)
    with run.tune.off():
        plain = module(x)
    for one in run.tune.trained.values():
        one.master.data.mul_(2.0)
    tuned = module(x)
    assert torch.equal(tuned[:, :32], plain[:, :32]) and torch.equal(tuned[:, 64:], plain[:, 64:])
    assert torch.equal(tuned[:, 32:64], 2.0 * plain[:, 32:64])


def test_observers_form_a_dense_gradient_only_when_they_observe(engine: Any, now: Any) -> None:
    model, batch = model_of(), rows_of_eight()
    full = plain_gradients(model, batch)
    run = engine({"some_entries": {"every": 2}}, model=model)
    assert not any(name.startswith("dense") for name in gradients(run, [batch], now))
    observed = {n: g for n, g in gradients(run, [batch], now._replace(step=1)).items() if n.startswith("dense")}
    assert len(observed) == 2
    assert gap(observed, {n: full[n.removeprefix("dense ")] for n in observed}) < 1e-10


def test_an_observer_whose_place_gets_no_gradient_is_an_error(engine: Any, now: Any) -> None:
    run = engine("some_entries")
    run.tune.start_observing(now._replace(step=1))
    with pytest.raises(LuthierError, match="no gradient reached"):
        run.tune.observe(lambda value: value, {}, lambda names: 1.0)


def test_a_whole_part_of_a_fused_projection_trains_as_rows(engine: Any, now: Any) -> None:
    model, batch = model_of("gpt2"), rows_of_eight()
    full = plain_gradients(model, batch)["transformer.h.0.attn.c_attn.weight"]
    run = engine({"full": {"target_modules": ["attention_value"], "blocks": [0]}}, model=model)
    found = gradients(run, [batch], now)
    (weight,) = [g for n, g in found.items() if "weight" in n]
    assert_rounded(weight, full.T[64:], TINY)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (Select("rows", torch.tensor([0, 0])), "twice"),
        (Select("rows", torch.tensor([32])), "0 to 31"),
        (Select("cols", torch.tensor([-1])), "0 to"),
        (Select("flat", torch.tensor([1.0])), "whole numbers"),
        (Select("whole", torch.tensor([1])), "no index"),
        (Select("flat", torch.tensor([], dtype=torch.int64)), "not be empty"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused_by_name(engine: Any, select: Select, message: str) -> None:
    value = Selective(lambda parts, services: {parts.select(target_modules=["mlp_down"])[0]: select})
    with pytest.raises(LuthierError, match=message) as caught:
        engine(value)
    assert "mlp.down_proj.weight" in str(caught.value)


def test_an_embedding_with_a_lookup_of_its_own_refuses_slices(engine: Any) -> None:
    with pytest.raises(LuthierError, match="in a way of its own"):
        engine({"some_rows": {"target_modules": ["position_embedding"]}}, architecture="opt")
