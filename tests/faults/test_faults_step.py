"""Faults of the step itself: what weight decay reaches, what clipping measures, and that processes step alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import load_file, save_file
from torch import Tensor

import luthier
from luthier import registry
from luthier.delta import Delta
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny
from luthier.recipe.parts import completed
from luthier.results.folder import Run, read_run
from luthier.training.build import build_engine
from luthier.training.engine import Engine
from luthier.tune.trained import decays
from tests.conftest import split
from tests.toys.helpers import gap, model_of, plain_gradients, rows_of_eight, toys  # noqa: F401

RATE, DECAY, LIMIT = 0.1, 0.5, 0.25
NOW = Now(step=0, steps=4, learning_rate=RATE)


def masters(run: Engine) -> dict[str, Tensor]:
    return {name: one.master.detach().clone() for name, one in run.tune.trained.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "qwen3", "gemma2"])
def test_weight_decay_skips_norms_and_biases(engine: Any, architecture: str) -> None:
    """Fault 30: with gradients of zero a step is decay alone: matrices shrink by rate x decay, norms and biases keep every bit."""
    run = engine("full", architecture=architecture, optimizer={"adamw": {"weight_decay": DECAY}})
    before = masters(run)
    for one in run.tune.trained.values():
        one.gradient = torch.zeros_like(one.master.detach())
    run.chain.step(NOW)
    shrunk = set()
    for name, after in masters(run).items():
        if torch.equal(after, before[name]):
            continue
        shrunk.add(name)
        assert torch.allclose(after, before[name] * (1 - RATE * DECAY), rtol=1e-14, atol=0.0), name
    matrices = {name for name, value in before.items() if value.ndim > 1}
    kept = before.keys() - matrices
    assert shrunk == matrices and any("norm" in name or "ln_" in name for name in kept)
    assert architecture not in ("gpt2", "phi") or any(name.endswith("bias") for name in kept)


@pytest.mark.parametrize("tune", ["lora", "some_rows", "some_entries", "growing", "full"])
def test_weight_decay_reaches_a_matrix_in_whatever_form_it_trains(engine: Any, tune: str) -> None:
    """Fault 30: entries of a matrix are a vector in memory and decay all the same, by rate x decay, beside the step itself."""
    before: dict[str, Tensor] = {}
    found = []
    for decay in (DECAY, 0.0):
        run = engine(tune, architecture="gpt2", optimizer={"adamw": {"weight_decay": decay}})
        before = masters(run)
        for one in run.tune.trained.values():
            one.gradient = torch.ones_like(one.master.detach())
        run.chain.step(NOW)
        found.append(masters(run))
    for name, one in run.tune.trained.items():
        matrix = run.tune.model.get_parameter(one.place.parameter).ndim > 1
        wanted = found[1][name] - matrix * RATE * DECAY * before[name]
        assert torch.allclose(found[0][name], wanted, rtol=0.0, atol=1e-15), name


def test_a_bias_of_many_experts_is_a_bias() -> None:
    """Fault 30: the biases of all experts stand in one tensor of two dimensions, and do not decay."""
    place = map_parts(model_of("mixtral")).select(target_modules=["expert"])[0]
    assert decays(place, torch.zeros(4, 8, 8))
    assert not decays(place._replace(tensor="gate_up_proj_bias"), torch.zeros(4, 8))


def clipped(model: Any, batch: Batch, limit: float) -> dict[str, Tensor]:
    """PyTorch's own clipping of autograd's gradients of the whole step."""
    found = plain_gradients(model, batch)
    held = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in found.values()]
    for one, gradient in zip(held, found.values(), strict=True):
        one.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(held, limit)
    return {name: one.grad for name, one in zip(found, held, strict=True) if one.grad is not None}


def joint_norm(values: dict[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in values.values()]).norm())


def test_the_norm_is_taken_once_over_everything_that_trains(engine: Any) -> None:
    """Fault 30: the same step as PyTorch's clipping of the whole step's gradient, over all micro-batches and tensors."""
    model, batch = model_of(), rows_of_eight()
    expected = clipped(copy.deepcopy(model), batch, LIMIT)
    whole = joint_norm(plain_gradients(copy.deepcopy(model), batch))
    assert whole > 2 * LIMIT and joint_norm(expected) == pytest.approx(LIMIT, rel=1e-5)
    run = engine("full", model=model, optimizer=[{"clip": {"norm": LIMIT}}, "sgd"])
    before = masters(run)
    run.step(split(batch, (5, 1, 2)), NOW)
    moved = {name.removeprefix("full/"): (before[name] - after) / RATE for name, after in masters(run).items()}
    assert gap(moved, expected) < 1e-9
    # What is logged is the norm before clipping, once.
    assert [state["norm"] for state in run.chain.state["clip"].values() if "norm" in state] == [pytest.approx(whole)]


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_a_norm_of_0_is_off(engine: Any, off: float | None) -> None:
    """Fault 30: no limit, not a limit of nothing: the step is the one without clipping, bit for bit."""
    found = []
    for step in ([{"clip": {"norm": off}}, "sgd"], ["sgd"], [{"clip": {"norm": LIMIT}}, "sgd"]):
        run = engine("full", model=model_of(), optimizer=step)
        run.step([rows_of_eight()], NOW)
        found.append(masters(run))
    assert gap(found[0], found[1]) == 0.0 and gap(found[2], found[1]) > 0.0
    with pytest.raises(LuthierError, match="the norm is -1"):
        registry.make({"clip": {"norm": -1.0}}, ("gradient_transform",))


def one_step(rank: int, size: int, folder: str) -> None:
    """A clipped step of one process; each writes what it moved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    model = model_of()
    run = build_engine(
        model,
        map_parts(model),
        completed(
            {
                "tune": "full",
                "objective": "cross_entropy",
                "optimizer": [{"clip": {"norm": LIMIT}}, "sgd"],
                "gradient_estimator": "backprop",
            }
        ),
        now=NOW,
    )
    before = masters(run)
    run.step(split(rows_of_eight(), (3, 5))[rank : rank + 1], NOW)
    moved = {name.removeprefix("full/"): (before[name] - after) / RATE for name, after in masters(run).items()}
    save_file({**moved, "norm": torch.tensor([s["norm"] for s in run.chain.state["clip"].values() if "norm" in s])},
              f"{folder}/{rank}.safetensors")  # fmt: skip
    luthier.train(whole_run(folder, "plural"))
    luthier.train(whole_run(folder, "spread", sharding="full"))
    dist.destroy_process_group()


def whole_run(folder: str | Path, name: str, **train: Any) -> dict[str, Any]:
    """Two epochs of plain SGD behind a limit that every gradient exceeds; 7 rows by 3 make 6 steps."""
    rows = [{"prompt": "Say it.", "completion": "so " * (i + 1)} for i in range(7)]
    keys = {"epochs": 2.0, "batch_rows": 3, "precision": "fp64", "learning_rate": 0.5, "schedule": "linear", "warmup": 2}
    return {
        "name": name,
        "model": "tiny:llama",
        "rows": {"train": rows},
        "optimizer": [{"clip": {"norm": 0.01}}, "sgd"],
        "train": {**keys, "device": "cpu", **train},
        "out": str(folder),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave."""
    folder = tmp_path_factory.mktemp("two")
    processes.spawn(one_step, (2, str(folder)), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run on one process."""
    return luthier.train(whole_run(tmp_path_factory.mktemp("one"), "one"))


def test_the_norm_is_taken_once_over_all_shards(one: Run, two: Path) -> None:
    """Fault 30: a model spread over two processes is clipped by the norm of the whole gradient, not of each shard."""
    spread = read_run(two / "spread-1")
    norms = [[line["gradient_norm"] for line in run.facts["history"]] for run in (one, spread)]
    assert min(norms[0]) > 0.1 and norms[1] == pytest.approx(norms[0], rel=1e-9)
    for name, value in tuned_weights(spread.folder).items():
        assert torch.allclose(value, one.model.get_parameter(name), rtol=0.0, atol=1e-10), name


def test_two_processes_follow_the_same_schedule(one: Run, two: Path) -> None:
    """Fault 29: as many steps and the same rates with 1 and 2 processes, over real steps; warm-up reaches the peak."""
    plain, plural = ([line["learning_rate"] for line in run.facts["history"]] for run in (one, read_run(two / "plural-1")))
    assert plain == pytest.approx([0.25, 0.5, 0.5, 0.5 * 3 / 4, 0.5 * 2 / 4, 0.5 * 1 / 4]) and plural == plain
    ends = tuned_weights(two / "plural-1")
    assert all(torch.allclose(value, one.model.get_parameter(name), rtol=0.0, atol=1e-10) for name, value in ends.items())


def tuned_weights(folder: Path) -> dict[str, Tensor]:
    model = tiny("llama", dtype=torch.float64)
    Delta.load(folder / "delta.safetensors").apply(model)
    return dict(model.named_parameters())


def test_the_norm_is_taken_after_the_processes_are_summed(two: Path) -> None:
    """Fault 30: two processes with unequal shares clip the sum of their gradients, both by the same norm."""
    expected = clipped(model_of(), rows_of_eight(), LIMIT)
    whole = joint_norm(plain_gradients(model_of(), rows_of_eight()))
    for rank in range(2):
        moved = load_file(two / f"{rank}.safetensors")
        assert moved.pop("norm").tolist() == [pytest.approx(whole)]
        assert gap(moved, expected) < 1e-9
    # The usual mistake: each process clips its own share, then they sum.
    pieces = [clipped(model_of(), share, LIMIT) for share in split(rows_of_eight(), (3, 5))]
    assert gap({name: pieces[0][name] + pieces[1][name] for name in expected}, expected) > 0.1
