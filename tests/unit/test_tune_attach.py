"""Attaching: what a technique's tensors are, which numbers may train together, and what is refused before anything trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds import RepresentationEdit, Select, Selective, WeightDelta
from luthier.models.parts import map_parts
from luthier.registry import Part
from luthier.tune import Tune
from tests.toys.helpers import model_of

DOWN = ("mlp_down",)


def part(value: Any) -> Part:
    return Part(name="probe", kind="any", options={}, values=(value,))


def selecting(role: str, select: Select, **options: Any) -> Selective:
    """Selects the first place of a role."""
    return Selective(lambda parts, services: {parts.select(target_modules=[role])[0]: select}, **options)


def test_tensors_of_a_technique_are_its_own_and_only_matrices_decay(engine: Any) -> None:
    given = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    value = WeightDelta(
        lambda place, weight_OI, services: {"mix": given, "scale": torch.ones(3)},
        lambda tensors, x: x.sum(-1, keepdim=True) * tensors["mix"].sum() * tensors["scale"].sum(),
        lambda tensors: tensors["mix"].sum() * tensors["scale"].sum(),
        target_modules=DOWN,
        rates={"scale": 4.0},
        axes={"mix": 1},
    )
    tune = engine([part(value)], model=model_of()).tune
    (first, second), scales = ([one for name, one in tune.trained.items() if name.endswith(end)] for end in ("mix", "scale"))
    assert [(one.decay, one.rate, one.axis) for one in (first, second)] == [(True, 1.0, 1)] * 2
    assert [(one.decay, one.rate, one.axis) for one in scales] == [(False, 4.0, 0)] * 2
    assert not any(one.changes for one in tune.trained.values())
    tune.set({first.name: torch.zeros(1, 2)})
    assert second.master.tolist() == given.tolist() == [[1.0, 2.0]]


def test_an_edit_names_the_matrices_that_do_not_decay(engine: Any) -> None:
    def start(place: Any, width_in: int, width_out: int, services: Any) -> dict[str, Tensor]:
        return {"both": torch.ones(2, 2), "apart": torch.ones(2, 2), "vector": torch.ones(2)}

    value = RepresentationEdit(start, lambda tensors, x, y: y, DOWN, undecayed=frozenset({"apart"}))
    tune = engine([part(value)], model=model_of(layers=1)).tune
    assert {name.rpartition(".")[2]: one.decay for name, one in tune.trained.items()} == {
        "both": True,
        "apart": False,
        "vector": False,
    }


def test_what_a_part_of_a_fused_projection_reads_is_not_edited(engine: Any) -> None:
    def edit(of: str) -> list[Part]:
        start = lambda place, width_in, width_out, services: {"shift": torch.zeros(1)}  # noqa: E731
        return [part(RepresentationEdit(start, lambda tensors, x, y: y, ("attention_key",), of=of))]  # type: ignore[arg-type]

    with pytest.raises(LuthierError, match="what a part of a fused projection reads"):
        engine(edit("input"), model=model_of("gpt2", layers=1))
    assert engine(edit("output"), model=model_of("gpt2", layers=1)).tune.trained
    assert engine(edit("input"), model=model_of(layers=1)).tune.trained


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_two_selections_of_a_weight_may_touch_and_not_overlap(engine: Any, architecture: str) -> None:
    model = model_of(architecture, layers=1)
    parts = map_parts(model)
    rows, columns = parts.view(model, parts.select(target_modules=DOWN)[0]).shape
    assert rows != columns

    def both(entry: int) -> Any:
        last_row, one = Select("rows", torch.tensor([rows - 1])), Select("flat", torch.tensor([entry]))
        return engine([part(selecting("mlp_down", each)) for each in (last_row, one)], model=model_of(architecture, layers=1))

    begin = (rows - 1) * columns
    assert len(both(begin - 1).tune.trained) == 2
    for entry in (begin, rows * columns - 1):
        with pytest.raises(LuthierError, match="both train the same numbers"):
            both(entry)


def test_a_tensor_of_which_entries_may_come_to_train_is_refused_at_once_where_they_cannot(engine: Any) -> None:
    whole = Select("whole")
    with pytest.raises(LuthierError, match="in a way of its own"):
        engine(selecting("position_embedding", whole, refresh=lambda state, services: {}), architecture="opt")
    assert engine(selecting("position_embedding", whole), architecture="opt").tune.trained


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (Select("rows", torch.tensor([0])), "trains a part of a tensor"),
        (Select("whole", decay="start"), "needs the base's values"),
    ],
)
def test_a_model_spread_over_processes_says_what_it_cannot_do(select: Select, words: str) -> None:
    model: Any = model_of(layers=1)
    tune = Tune(model, map_parts(model), root=SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(LuthierError, match=words):
        tune.add("probe", selecting("mlp_down", select), SimpleNamespace(), {})  # type: ignore[arg-type]
