"""LoCA: the cosine transform, hand-worked location gradients, the turns of coefficients and locations, whole runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.weight_delta._cosine import (
    HIGHEST,
    bounded,
    cells,
    cosine_basis,
    inverse_transform,
    located,
    location_gradients,
    scatter,
)
from luthier.registry import make
from luthier.training.dryrun import peak_of
from tests.conftest import split
from tests.toys.helpers import model_of, rows_of_eight
from tests.unit.test_kinds_resume import assert_equal, assert_resumes, everything, go

DOUBLE = torch.float64
Z = torch.tensor([[1, 2, 4], [3, 5, 9], [0, 1, 2]], dtype=DOUBLE)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def basis(size: int) -> Tensor:
    return cosine_basis(size, torch.zeros((), dtype=DOUBLE))


def at(cell: int, size: int) -> Tensor:
    """A location that stands at a cell."""
    return doubles(min(cell / (size - 1), HIGHEST))


def dense(*entries: tuple[float, int, int], height: int = 3, width: int = 3) -> Tensor:
    values, rows, columns = zip(*entries, strict=True)
    location = [torch.cat([at(cell, size) for cell in line]) for line, size in ((rows, height), (columns, width))]
    return scatter(doubles(*values), *location, height, width)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64])
def test_the_basis_is_orthonormal_and_its_formula(size: int) -> None:
    assert torch.allclose(basis(size) @ basis(size).T, torch.eye(size, dtype=DOUBLE), atol=1e-12)
    for k in range(size):
        for n in range(size):
            norm = math.sqrt((1 if k == 0 else 2) / size)
            assert abs(float(basis(size)[k, n]) - norm * math.cos(math.pi * (2 * n + 1) * k / (2 * size))) < 1e-12


def test_a_large_basis_in_fp32_is_as_exact_as_fp32_can_be() -> None:
    assert torch.allclose(cosine_basis(700, torch.zeros(())), basis(700).float(), atol=1e-7)


def test_the_gradient_of_the_transform_is_its_transpose() -> None:
    spectrum = random(6, 5).requires_grad_(True)
    assert torch.autograd.gradcheck(inverse_transform, (spectrum,))


def test_one_coefficient_at_the_origin_is_a_constant() -> None:
    change = inverse_transform(dense((0.7, 0, 0), height=3, width=5))
    assert torch.allclose(change, torch.full((3, 5), 0.7 / math.sqrt(15), dtype=DOUBLE))


def test_the_orientation_of_the_transform() -> None:
    change = inverse_transform(dense((1.0, 0, 1)))
    assert torch.allclose(change, doubles(1 / math.sqrt(6), 0, -1 / math.sqrt(6)).expand(3, 3))
    assert abs(float(change[0, 0]) - 0.4082) < 5e-5


def test_the_transform_keeps_lengths_and_cells_add_up() -> None:
    spectrum = dense((1.0, 2, 1), (2.0, 2, 1), (-0.5, 0, 4), height=7, width=5)
    assert float(spectrum[2, 1]) == 3.0 and int(spectrum.count_nonzero()) == 2
    assert abs(float(inverse_transform(spectrum).norm() - spectrum.norm())) < 1e-12


def test_locations_round_half_to_even_and_the_last_cells_are_out_of_reach() -> None:
    assert cells(doubles(-0.3, 0.25, 0.75, 0.5, 1.7), 3).tolist() == [0, 0, 2, 1, 2]
    assert int(cells(doubles(1.0), 501)) == 500 and int(cells(doubles(1.0), 502)) == 500
    assert int(cells(doubles(1.0), 768)) == 766 and int(cells(doubles(1.0), 4096)) == 4091


@pytest.mark.parametrize(
    ("cell", "by_row", "by_column"),
    [((1, 1), -0.05, 0.3), ((0, 2), 0.25, 0.1)],
)
def test_location_gradients_worked_by_hand(cell: tuple[int, int], by_row: float, by_column: float) -> None:
    row, column = location_gradients(Z, doubles(0.1), at(cell[0], 3), at(cell[1], 3))
    assert torch.allclose(torch.cat([row, column]), doubles(2 * by_row, 2 * by_column), atol=1e-12)


def test_location_gradients_vanish_outside_the_range() -> None:
    row, column = location_gradients(Z, doubles(0.1, 0.1), doubles(-0.01, 0.5), doubles(0.5, 1.0))
    assert float(row[0]) == 0.0 and float(column[1]) == 0.0
    assert float(column[0]) == pytest.approx(2 * 0.5 * 0.1 * (4 - 1)) and float(row[1]) == pytest.approx(2 * 0.5 * 0.1 * (2 - 4))


@pytest.mark.parametrize("cell", [(2, 3), (0, 0), (6, 4), (0, 2)])
def test_the_gradient_is_half_the_losss_difference_between_neighbors(cell: tuple[int, int]) -> None:
    """With a loss that is linear in the change; at an edge the cell itself stands in."""
    height, width, value = 7, 5, 0.01
    slope = random(height, width)

    def loss(row: int, column: int) -> float:
        inside = (min(max(row, 0), height - 1), min(max(column, 0), width - 1))
        return float((slope * inverse_transform(dense((value, *inside), height=height, width=width))).sum())

    leaves = [one.requires_grad_(True) for one in (doubles(value), at(cell[0], height), at(cell[1], width))]
    (slope * inverse_transform(scatter(leaves[0], leaves[1], leaves[2], height, width))).sum().backward()
    by_row = 0.5 * (loss(cell[0] + 1, cell[1]) - loss(cell[0] - 1, cell[1]))
    by_column = 0.5 * (loss(cell[0], cell[1] + 1) - loss(cell[0], cell[1] - 1))
    assert abs(leaves[1].grad.item() - (height - 1) * by_row) < 1e-12
    assert abs(leaves[2].grad.item() - (width - 1) * by_column) < 1e-12
    assert abs(leaves[0].grad.item() - loss(*cell) / value) < 1e-12


def test_coefficient_gradients_are_autograds_through_a_dense_spectrum() -> None:
    values, rows, columns = random(40), torch.rand(40, dtype=DOUBLE), torch.rand(40, dtype=DOUBLE)
    slope = random(6, 5, seed=1)
    ours, theirs = values.clone().requires_grad_(True), values.clone().requires_grad_(True)
    (inverse_transform(scatter(ours, rows, columns, 6, 5)) * slope).pow(2).sum().backward()
    spectrum = torch.zeros(6, 5, dtype=DOUBLE).index_put((cells(rows, 6), cells(columns, 5)), theirs, accumulate=True)
    (inverse_transform(spectrum) * slope).pow(2).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-13)


def test_descending_a_location_lowers_the_coefficient_times_its_gradient() -> None:
    row, column = doubles(0.5), doubles(0.5)
    by_row, by_column = location_gradients(Z, doubles(0.1), row, column)
    moved = Z[cells(row - 10 * by_row, 3), cells(column - 10 * by_column, 3)]
    assert float(0.1 * moved) < float(0.1 * Z[1, 1])


def test_coefficients_everywhere_fit_any_target() -> None:
    height, width, alpha = 6, 5, 2.0
    target = random(height, width)
    places = [(i, j) for i in range(height) for j in range(width)]
    best = basis(height) @ target @ basis(width).T / alpha
    spectrum = dense(*((float(best[i, j]), i, j) for i, j in places), height=height, width=width)
    assert torch.allclose(alpha * inverse_transform(spectrum), target, atol=1e-5)


def one_step(run: Any, now: Now, step: int, steps: int) -> dict[str, bool]:
    """Whether coefficients, rows and columns moved in a step."""
    before = {name: one.master.detach().clone() for name, one in run.tune.trained.items()}
    run.step([rows_of_eight(seed=step)], now._replace(step=step, steps=steps, learning_rate=0.01))
    moved: dict[str, bool] = dict.fromkeys(("coefficients", "rows", "columns"), False)
    for name, one in run.tune.trained.items():
        moved[name.rpartition(".")[2]] |= not torch.equal(before[name], one.master)
    return moved


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_coefficients_and_locations_take_turns_until_the_search_ends(engine: Any, now: Now, architecture: str) -> None:
    options = {"coefficients": 20, "search": 0.5, "coefficient_steps": 2, "location_steps": 3, "location_learning_rate_factor": 1.0}
    run = engine({"loca": options}, model=model_of(architecture, layers=1), optimizer="adamw")
    for step in range(16):
        moved = one_step(run, now, step, steps=24)
        locations = step < 12 and step % 5 >= 2
        assert moved == {"coefficients": not locations, "rows": locations, "columns": locations}, step


def test_the_papers_turns(now: Now) -> None:
    """Ten steps of coefficients, twenty of locations, over a tenth of the run."""
    weight_delta, _, freezing = make("loca", ("weight_delta",)).values

    class One:
        def __init__(self, name: str) -> None:
            self.name = name

    for step in range(400):
        at_step = now._replace(step=step, steps=2000)
        still = [
            freezing.frozen(One(f"loca/model.q_proj.weight.{name}"), {}, at_step) for name in ("coefficients", "rows", "columns")
        ]
        locations = step < 200 and step % 30 >= 10
        assert still == [locations, not locations, not locations]
    assert weight_delta.rates == {"rows": 0.02, "columns": 0.02}


def test_idle_moments_stay_and_no_location_decays(engine: Any, now: Now) -> None:
    options = {"coefficients": 20, "search": 1.0, "coefficient_steps": 1, "location_steps": 1}
    run = engine({"loca": options}, model=model_of(layers=1), optimizer={"adamw": {"weight_decay": 0.5}})
    assert not any(one.decay for one in run.tune.trained.values())
    one_step(run, now, 0, steps=4)
    name = next(name for name in run.tune.trained if name.endswith(".coefficients"))
    before = {key: value.clone() for key, value in run.chain.state["adamw"][name].items()}
    one_step(run, now, 1, steps=4)
    assert all(torch.equal(value, before[key]) for key, value in run.chain.state["adamw"][name].items())


def test_no_search_keeps_locations_where_they_began(engine: Any, now: Now) -> None:
    run = engine({"loca": {"coefficients": 20, "search": 0.0}}, model=model_of(layers=1), optimizer="adamw")
    for step in range(4):
        assert one_step(run, now, step, steps=4) == {"coefficients": True, "rows": False, "columns": False}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merging_adds_the_inverse_transform(engine: Any, architecture: str) -> None:
    model = model_of(architecture, layers=1)
    run = engine({"loca": {"coefficients": 30, "alpha": 3.0}}, model=model)
    assert {own.place.role for own in run.tune.owns} == {"attention_query", "attention_value"}
    before = {own.place: run.tune.region(own.place).clone() for own in run.tune.owns}
    run.tune.set({name: random(30) for name in run.tune.trained if name.endswith(".coefficients")})
    run.tune.merge()
    for own in run.tune.owns:
        values = own.masters()
        height, width = before[own.place].shape
        row, column = (located(begin, values[name]) for begin, name in zip(values["begin"], ("rows", "columns"), strict=True))
        assert bool((row >= 0).all()) and bool((row < 1).all()) and len(cells(row, height).unique()) > 8
        spectrum = scatter(values["coefficients"], row, column, height, width)
        wanted = before[own.place] + 3.0 * basis(height).T @ spectrum @ basis(width)
        assert torch.allclose(run.tune.region(own.place), wanted, atol=1e-12)


def test_a_model_in_bf16_trains_with_what_is_merged(engine: Any) -> None:
    """Coefficients and the way of locations were rounded to bf16, in which 768 cells are not told apart, before they were used."""
    run = engine({"loca": {"coefficients": 200}}, model=model_of(layers=1), dtype=torch.bfloat16)
    run.tune.set({name: 0.1 * random(200, seed=len(name)).float() for name in run.tune.trained})
    own = run.tune.owns[0]
    used, merged = own.tensors(torch.bfloat16), own.masters()
    assert used["rows"].dtype == used["coefficients"].dtype == torch.float32
    assert torch.equal(own.value.delta(used), own.value.delta(merged))
    at = {**merged, "shape": torch.tensor([768, 768])}
    exact = cells(at["begin"][0].double() / (1 << 24) + at["rows"].double(), 768)
    assert torch.equal(cells(located(at["begin"][0], at["rows"]), 768), exact)


def test_the_gradients_of_a_step_are_bounded_and_not_those_of_its_passes(engine: Any, now: Now) -> None:
    """Each backward pass bounded its own gradients of locations, so that they followed from the split into micro-batches."""
    batch, found = rows_of_eight(), []
    for sizes in ((8,), (3, 1, 4)):
        run = engine({"loca": {"coefficients": 3, "search": 1.0}}, model=model_of(layers=1), objective={"dco": {"samples": 1}})
        rng = torch.Generator().manual_seed(0)
        large = {
            name: 30.0 * torch.randn(one.master.shape, generator=rng).double()
            for name, one in run.tune.trained.items()
            if name.endswith(".coefficients")
        }
        run.tune.set(large)
        run._afterwards = lambda now: []
        run.chain.watching = frozenset(run.tune.trained)
        run.step(split(batch, sizes), now._replace(step=15))
        found.append(dict(run.chain.received))
    whole, parts = found
    assert whole and max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-9
    assert any(float(one.abs().max()) == 31.0 for one in whole.values()), "the bound is reached"


def test_gradients_of_locations_move_by_a_cell_at_most() -> None:
    assert bounded(doubles(-10.0, -3.5, 0.25, 3.5, 10.0), 5).tolist() == [-4.0, -3.5, 0.25, 3.5, 4.0]


def test_a_location_that_moved_keeps_its_gradient_whole() -> None:
    moved = (1e-3 * random(50)).requires_grad_(True)
    weights = random(50, seed=1)
    (located(torch.arange(50), moved) * weights).sum().backward()
    assert torch.equal(moved.grad, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficients": 0}, "coefficients is 0"),
        ({"coefficient_steps": 0}, "coefficient_steps is 0"),
        ({"location_steps": 0}, "location_steps is 0"),
        ({"dropout": 1.0}, "the dropout is 1.0"),
        ({"search": 1.5}, "the search is 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LuthierError, match=message):
        make({"loca": options}, ("weight_delta",))


@pytest.mark.parametrize(
    "options",
    [
        {"coefficients": 1},
        {"coefficient_steps": 1},
        {"location_steps": 1},
        {"search": 0.0},
        {"search": 0.01},
        {"search": 1.0},
        {"dropout": 0.0},
        {"dropout": 0.01},
    ],
)
def test_options_at_the_edge_of_their_range_are_taken(options: dict[str, Any]) -> None:
    made = make({"loca": options}, ("weight_delta",)).values[0]
    assert made.draws == (options.get("dropout", 0.0) > 0)


def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(engine: Any, now: Now, tmp_path: Path) -> None:
    setting = {
        "tune": {
            "loca": {
                "coefficients": 20,
                "search": 0.5,
                "coefficient_steps": 2,
                "location_steps": 2,
                "location_learning_rate_factor": 1.0,
            }
        },
        "optimizer": "adamw",
    }
    assert_resumes(engine, now, tmp_path / "step-3", **setting)


def test_a_pass_on_shapes_alone_leaves_nothing_behind(engine: Any, now: Now) -> None:
    runs = [
        engine(
            {"loca": {"coefficients": 20, "search": 0.5, "coefficient_steps": 1, "location_steps": 1}},
            model=model_of(),
            optimizer="adamw",
        )
        for _ in range(2)
    ]
    assert peak_of(runs[0], [rows_of_eight()], now).total > 0
    for run in runs:
        go(run, now, 0, 4)
    assert_equal(everything(runs[0]), everything(runs[1]))
