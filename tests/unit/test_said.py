"""SAID and DID: the Fastfood projection against hand-worked numbers and its own adjoint, then whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.methods.weight_delta._fastfood import Fastfood, draw, fastfood, fastfood_adjoint, project, walsh_hadamard
from luthier.methods.weight_delta.said import intrinsic_dimension
from luthier.registry import make
from luthier.training.dryrun import peak_of
from tests.conftest import split
from tests.toys.helpers import gradients, model_of, rows_of_eight
from tests.unit.test_kinds_resume import assert_equal, assert_resumes, everything, go

DOUBLE = torch.float64


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


WORKED = Fastfood(doubles(1, -1, 1, 1)[None], torch.tensor([[2, 0, 3, 1]]), doubles(1, 2, -1, 0.5)[None])


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(4, (-0.9, -0.7, -0.3, 1.1)), (3, (-1.03923, -0.80829, -0.34641))],
)
def test_a_transform_worked_by_hand(size: int, wanted: tuple[float, ...]) -> None:
    """B v = (1, -2, 0, 0), H B v = (-1, 3, -1, 3), in the order 2, 0, 3, 1: (-1, -1, 3, 3)."""
    assert torch.allclose(fastfood(doubles(1, 2), WORKED, size), doubles(*wanted), atol=5e-6)


def test_the_walsh_hadamard_transform() -> None:
    assert walsh_hadamard(torch.eye(2)).tolist() == [[1, 1], [1, -1]]
    matrix = walsh_hadamard(torch.eye(8, dtype=DOUBLE))
    two = doubles(1, 1, 1, -1).view(2, 2)
    assert torch.equal(matrix, torch.kron(two, torch.kron(two, two)))
    x = random(3, 8)
    assert torch.allclose(walsh_hadamard(walsh_hadamard(x)), 8 * x)
    assert torch.allclose(walsh_hadamard(x), x @ matrix)
    for other in (x[0], x.expand(2, 3, 8)):
        assert torch.allclose(walsh_hadamard(other), other @ matrix)


@pytest.mark.parametrize(("length", "size", "chunk"), [(20, 100, 1 << 16), (20, 300, 64), (50, 7, 64), (20, 128, 32), (1, 1, 8)])
def test_the_gradient_is_the_exact_adjoint(length: int, size: int, chunk: int) -> None:
    """Padded tensors, several chunks, and a vector that is longer than the tensor."""
    drawn = draw(length, size, seed=3, chunk=chunk).like(doubles(0))
    x, y = random(length, seed=1), random(size, seed=2)
    forward, backward = fastfood(x, drawn, size) @ y, x @ fastfood_adjoint(y, drawn, length)
    assert abs(float(forward - backward)) < 1e-12 * float(x.norm() * y.norm())
    leaf = x.clone().requires_grad_(True)
    (project(leaf, size, 3, chunk=chunk) @ y).backward()
    assert torch.equal(leaf.grad, fastfood_adjoint(y, drawn, length))
    assert torch.autograd.gradcheck(lambda v: project(v, size, 3, chunk=chunk), (leaf,))


def test_a_projection_is_linear_and_its_seeds() -> None:
    a, b = random(20, seed=1), random(20, seed=2)
    assert torch.allclose(project(a + 2 * b, 150, 5), project(a, 150, 5) + 2 * project(b, 150, 5), atol=1e-13)
    assert torch.equal(project(a, 150, 5), project(a, 150, 5))
    assert not torch.equal(project(a, 150, 5), project(a, 150, 6))
    assert torch.allclose(project(a.float(), 150, 5), project(a, 150, 5).float(), atol=1e-5)


@pytest.mark.parametrize(("size", "chunk"), [(64, 1 << 16), (100, 1 << 16), (300, 64), (330, 64)])
def test_a_projection_keeps_the_length_on_average(size: int, chunk: int) -> None:
    """Also in chunks: they do not make the whole longer."""
    ratios = []
    for seed in range(200):
        vector = random(20, seed=seed)
        ratios.append(project(vector, size, 1000 + seed, chunk=chunk).square().sum() / vector.square().sum())
    assert abs(float(torch.stack(ratios).mean()) - 1) < 0.05


def test_chunks_are_transforms_of_their_own_and_no_longer_than_needed() -> None:
    drawn = draw(20, 300, seed=0, chunk=64)
    assert drawn.sign_CS.shape == drawn.order_CS.shape == drawn.normal_CS.shape == (5, 64)
    assert not torch.equal(drawn.sign_CS[0], drawn.sign_CS[1]) and not torch.equal(drawn.order_CS[0], drawn.order_CS[1])
    assert draw(20, 100, seed=0, chunk=1 << 16).sign_CS.shape == (1, 128)
    assert draw(100, 7, seed=0, chunk=64).sign_CS.shape == (1, 128)
    sides = {size: draw(1, size, seed=0).sign_CS.shape[1] for size in (1, 2, 3, 4, 5, 63, 64, 65)}
    assert sides == {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 63: 64, 64: 64, 65: 128}
    # More than 65,536 numbers are made by several transforms, wherever nothing else is asked for.
    assert draw(1, 70_000, seed=0).sign_CS.shape == (2, 65_536)
    assert torch.equal(project(random(1), 70_000, 0), project(random(1), 70_000, 0, chunk=65_536))
    assert sorted(drawn.order_CS[2].tolist()) == list(range(64))
    assert set(drawn.sign_CS.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("scales", ["block", "none"])
def test_exactly_so_many_numbers_train(engine: Any, scales: str, architecture: str) -> None:
    run = engine({"said": {"dimension": 50, "scales": scales}}, model=model_of(architecture))
    sizes = {name: one.numel for name, one in run.tune.trained.items()}
    assert sizes == ({"said.vector": 48, "said.scale": 2} if scales == "block" else {"said.vector": 50})
    assert not any(one.decay for one in run.tune.trained.values())
    places = {str(addition.place) for site in run.tune.sites.values() for addition in site.additions}
    assert len(places) == 2 * (7 if architecture == "llama" else 6)


def test_scales_of_one_are_did_and_have_no_gradient_at_the_start(engine: Any, now: Now) -> None:
    plain = engine({"said": {"dimension": 48, "scales": "none"}}, model=model_of())
    scaled = engine({"said": {"dimension": 50}}, model=model_of())
    batches = split(rows_of_eight(), (5, 3))
    first, second = gradients(plain, batches, now), gradients(scaled, batches, now)
    assert torch.equal(first["said.vector"], second["said.vector"]) and float(first["said.vector"].norm()) > 0
    assert torch.equal(second["said.scale"], torch.zeros(2, dtype=DOUBLE))
    value = 0.1 * random(48)
    for run in (plain, scaled):
        run.tune.set({"said.vector": value})
    first, second = gradients(plain, batches, now), gradients(scaled, batches, now)
    assert torch.equal(first["said.vector"], second["said.vector"]) and bool((second["said.scale"] != 0).all())


def test_every_weight_moves_by_its_own_projection_times_its_blocks_scale(engine: Any) -> None:
    model = model_of("gpt2")
    run = engine({"said": {"dimension": 50}}, model=model)
    vector, scale = random(48), doubles(1.5, -2.0)
    run.tune.set({"said.vector": vector, "said.scale": scale})
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    owns = [own for own in run.tune.owns if own.place is not None]
    run.tune.merge()
    seeds = set()
    for own in owns:
        height, width, layer, seed = own.frozen["layout"].tolist()
        place, seeds = own.place, seeds | {seed}
        moved = model.get_parameter(place.parameter) - before[place.parameter]
        # GPT-2 stores [I, O].
        moved_OI = moved.T[place.start : place.stop]
        assert layer == place.block and moved_OI.shape == (height, width)
        wanted = scale[layer] * project(vector, height * width, seed).view(height, width)
        assert torch.allclose(moved_OI, wanted, atol=1e-12)
    assert len(seeds) == len(owns) == 12


def test_a_model_in_bf16_trains_with_the_scales_that_are_merged(engine: Any) -> None:
    """Scales were rounded to bf16 before they were used, in which 1.003 is 1, and merged as they are."""
    model = model_of(layers=1)
    run = engine("said", model=model, dtype=torch.bfloat16)
    run.tune.set({"said.vector": random(199).float(), "said.scale": torch.tensor([1.003])})
    own = run.tune.owns[-1]
    used, merged = own.value.delta(own.tensors(torch.bfloat16)), own.value.delta(own.masters())
    assert torch.equal(used, merged)
    run.tune.set({"said.scale": torch.tensor([1.0])})
    assert float((merged / own.value.delta(own.masters())).mean()) == pytest.approx(1.003, abs=1e-5)


def test_the_scale_of_a_head_is_one_more(engine: Any) -> None:
    model = model_of(tied=False)
    run = engine({"said": {"dimension": 50, "target_modules": ["linear", "head"]}}, model=model)
    assert run.tune.trained["said.scale"].numel == 3
    layouts = {own.place.role: own.frozen["layout"].tolist()[2] for own in run.tune.owns if own.place is not None}
    assert layouts["head"] == 2


def test_the_seed_of_the_run_decides_the_projections(engine: Any) -> None:
    def layouts(seed: int) -> list[list[int]]:
        run = engine("said", model=model_of(), seed=seed)
        return [own.frozen["layout"].tolist() for own in run.tune.owns if own.place is not None]

    assert layouts(0) == layouts(0)
    assert not set(map(tuple, layouts(0))) & set(map(tuple, layouts(1)))


def test_it_learns(engine: Any, now: Now) -> None:
    run = engine({"said": {"dimension": 200}}, model=model_of(), optimizer="adamw")
    losses = [run.step([rows_of_eight()], now._replace(step=i, learning_rate=0.1)).loss for i in range(20)]
    assert losses[-1] < losses[0] - 0.3


def test_dimensions_that_leave_nothing_are_refused(engine: Any) -> None:
    with pytest.raises(LuthierError, match="none is left to project"):
        engine({"said": {"dimension": 2}}, model=model_of())
    for options in ({"dimension": 3}, {"dimension": 1, "scales": "none"}):
        assert engine({"said": options}, model=model_of()).tune.trained["said.vector"].numel == 1
    with pytest.raises(LuthierError, match="the dimension is 0"):
        make({"said": {"dimension": 0}}, ("weight_delta",))


def test_the_intrinsic_dimension_is_the_smallest_that_reaches_the_share() -> None:
    scores = {1000: 0.80, 10: 0.40, 100: 0.72, 300: 0.70}
    assert intrinsic_dimension(scores, 0.8) == 100
    assert intrinsic_dimension(scores, 0.8, share=1.0) == 1000
    assert intrinsic_dimension(scores, 0.9) is None


def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(engine: Any, now: Now, tmp_path: Path) -> None:
    setting = {"tune": {"said": {"dimension": 50}}, "optimizer": "adamw"}
    assert_resumes(engine, now, tmp_path / "step-3", **setting)


def test_a_pass_on_shapes_alone_leaves_nothing_behind(engine: Any, now: Now) -> None:
    runs = [engine({"said": {"dimension": 50}}, model=model_of(), optimizer="adamw") for _ in range(2)]
    assert peak_of(runs[0], [rows_of_eight()], now).total > 0
    for run in runs:
        go(run, now, 0, 4)
    assert_equal(everything(runs[0]), everything(runs[1]))
