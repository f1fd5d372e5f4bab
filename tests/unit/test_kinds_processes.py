"""One process and two take the same steps, also when one of them has no rows or no targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now
from luthier.models.parts import map_parts
from luthier.recipe.parts import completed
from luthier.training.build import build_engine
from tests.conftest import calibration, make_batch, split
from tests.toys.helpers import TOYS, model_of, rows_of_eight

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"step": ["clip", "adamw"]},
    "entries": {"tune": "some_entries", "step": "adamw"},
    "growing": {"tune": "growing", "step": "adamw"},
    "look": {"weight": "drop_easiest"},
    "rows and tokens of the step": {"weight": {"q_tuning": {"rows": 0.6}}},
    "tasks": {"weight": {"task_balance": {"by": "rows"}}},
    "tasks by their probability": {"weight": "task_focal"},
    "tasks by their losses": {"weight": {"convergence_balance": {"validation_source": "other", "every": 1, "window": 2}}},
    "attention and an earlier state": {"tune": "lora", "weight": {"sstoken": {"attention_only": 0.25, "every": 2, "average": 0.5}}},
    "reference": {"weight": "beats_reference"},
    "penalty": {"objective": ["cross_entropy", {"pull_to_start": {"weight": 1.0}}, "extra_head"]},
    "masked inputs": {"objective": ["cross_entropy", {"masked_thought": {"warmup": 0.5}}, "drop_tokens"]},
    "heads ahead": {"objective": {"caft": {"heads_first": 0.25, "head_rate": 1.0}}},
    "zeroth order": {"source": "zeroth_order"},
}


def shares(step: int) -> list[list[Batch]]:
    """The micro-batches of two processes: even, uneven, none at all, and without a target."""
    whole = split(rows_of_eight(seed=step), (5, 3))
    quiet = make_batch([(4, 0)], first=50)
    return [[whole[:1], whole[1:]], [whole[1:], whole[:1]], [whole, [quiet]], [whole, []]][step]


def run(rank: int, size: int, folder: str) -> None:
    """Four steps of every setting; each process writes what it ended with."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    registry.add_folder(TOYS)
    found: dict[str, Tensor] = {}
    for name, setting in SETTINGS.items():
        model = model_of()
        engine = build_engine(
            model,
            map_parts(model),
            completed(
                {
                    "tune": setting.get("tune", "full"),
                    "objective": setting.get("objective", "cross_entropy"),
                    "token_weight": setting.get("weight"),
                    "step": setting.get("step", "sgd"),
                    "source": setting.get("source", "backprop"),
                }
            ),
            calibration=calibration,
            now=Now(steps=4),
        )
        for step in range(4):
            mine = shares(step)[rank] if size > 1 else [batch for share in shares(step) for batch in share]
            result = engine.step(mine, Now(step=step, steps=4, learning_rate=0.02))
            found[f"{name} loss {step}"] = torch.tensor([result.loss, result.nll, result.kept, float(result.tokens)])
        found |= {f"{name} {key}": one.master.detach().clone() for key, one in engine.tune.trained.items()}
    registry.remove_folder(TOYS)
    save_file(found, f"{folder}/{size}-{rank}.safetensors")
    if size > 1:
        dist.destroy_process_group()


def test_fault_2_two_processes_equal_one(tmp_path: Path) -> None:
    """Fault 2: gradients, observed ones, growth, rules over the step and losses agree with one process."""
    processes.spawn(run, (2, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    run(0, 1, str(tmp_path))
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert one.keys() == first.keys() == second.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        assert value.shape == first[name].shape, name
        assert torch.allclose(first[name], value, rtol=1e-9, atol=1e-10), name


def break_one(rank: int, folder: str) -> None:
    """The loss of one row of the second process is no number."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = model_of()
    engine = build_engine(
        model,
        map_parts(model),
        completed({"tune": "full", "objective": "cross_entropy", "step": "sgd", "source": "backprop"}),
        now=Now(steps=1),
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sound = engine.objective.total

    def total(*arguments: Any, **options: Any) -> Any:
        sums = sound(*arguments, **options)
        return sums._replace(loss=sums.loss * float("nan")) if rank == 1 else sums

    engine.objective.total = total  # type: ignore[method-assign]
    try:
        engine.step(shares(0)[rank], Now(steps=1, learning_rate=1.0))
    except LuthierError as error:
        Path(folder, f"said-{rank}").write_text(f"{error.what}\n{error.where}")
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    dist.destroy_process_group()


def test_fault_4_a_loss_that_is_no_number_stops_all_processes(tmp_path: Path) -> None:
    """Fault 4: no process is left waiting, each names the rows of the one whose loss overflowed, and nothing moved."""
    processes.spawn(break_one, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    rows = [row for batch in shares(0)[1] for row in batch.row_ids]
    for rank in (0, 1):
        what, where = (tmp_path / f"said-{rank}").read_text().split("\n")
        assert what.startswith("the loss is not a finite number")
        assert where == f"rows {', '.join(rows)}"
