"""Two processes that stand ready: started once, they take steps with whatever plain data describes, and tell what they ended with."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from luthier import registry
from luthier.errors import LuthierError
from luthier.kinds import Batch, Freezing, Now, Refresh, Select, Selective
from luthier.recipe.parts import completed
from luthier.registry import Part
from luthier.training.engine import Engine
from tests.conftest import make_batch, split
from tests.contracts.fixtures import engine_of, rows_for, run_of
from tests.toys.helpers import TOYS, rows_of_eight
from tests.unit.test_kinds_resume import everything

SIZE, STEPS = 2, 6
PATIENCE = 120.0
"""Seconds after which a process that says nothing is given up."""


class Told(NamedTuple):
    """What a process says of one task."""

    found: dict[str, Any]
    """All numbers of the run when it ended, and what each step reported."""
    refused: str = ""
    """Why it took no step, or no further one."""
    fix: str = ""


def shares(step: int, kinds: tuple[str, ...] = ()) -> list[list[Batch]]:
    """The micro-batches of two processes: even, uneven, none at all, without a target, and even ones."""
    whole = split(rows_for(kinds, seed=step) if kinds else rows_of_eight(seed=step), (5, 3))
    # A head reads rows without targets, too, and what it learns is missing in those that are made here.
    quiet = rows_for(kinds, seed=step, first=50) if "head" in kinds else make_batch([(4, 0)], first=50)
    return [[whole[:1], whole[1:]], [whole[1:], whole[:1]], [whole, [quiet]], [whole, []]][step % 4]


def engine_for(task: dict[str, Any]) -> Engine:
    """The engine of a task: of a technique in its place, or of what stands under a recipe's keys."""
    if "kind" in task:
        return run_of(task["kind"], task["name"])
    chosen = completed(
        {"tune": "full", "objective": "cross_entropy", "optimizer": "sgd", "gradient_estimator": "backprop", **task["keys"]}
    )
    return engine_of(**{key: list(parts) for key, parts in chosen.items()}, now=Now(steps=STEPS))


def perform(task: dict[str, Any], rank: int | None = None) -> Told:
    """Take the steps of a task: with one's share of the rows, or alone with all of them."""
    if task.get("breaks"):
        return _broken(rank)
    if "apart" in task:
        return _apart(task["apart"], rank or 0)
    found: dict[str, Any] = {}
    kinds = (task["kind"],) if "kind" in task else ()
    steps = 20 if kinds else STEPS
    try:
        engine = engine_for(task)
        engine.tune.model.train()
        # Techniques need not be tried where both have equally much.
        for step in range(STEPS)[bool(kinds) :]:
            both = shares(step, kinds)
            mine = [batch for share in both for batch in share] if rank is None else both[rank]
            result = engine.step(mine, Now(step=step, steps=steps, learning_rate=0.02))
            if "gradients" not in found:
                # Plain steps: what they moved is the gradient.
                found |= {"gradients": step} | {f"first {name}": one.master for name, one in engine.tune.trained.items()}
            found[f"step {step}"] = torch.tensor([result.loss, result.nll, result.kept, float(result.tokens)])
            # The loop reports the parts of a loss that has several.
            parts = result.parts if len(engine.objective.terms) > 1 else {}
            told = {**parts, **result.notes, **({} if result.weights is None else result.weights._asdict())}
            found |= {f"step {step} {key}": float(value) for key, value in told.items()}
    except LuthierError as error:
        return Told(plain(found), str(error), error.fix)
    return Told(plain({**found, **everything(engine)}))


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers as a pipe can carry them."""
    return {key: value.detach().cpu().numpy() if isinstance(value, Tensor) else value for key, value in found.items()}


def _broken(rank: int | None) -> Told:
    """A step in which the loss of one row of the second process is no number."""
    engine = engine_of(optimizer="sgd", now=Now(steps=1))
    before = [parameter.detach().clone() for parameter in engine.tune.model.parameters()]
    sound = engine.objective.total

    def total(*arguments: Any, **options: Any) -> Any:
        sums = sound(*arguments, **options)
        return sums._replace(loss=sums.loss * float("nan")) if rank == 1 else sums

    engine.objective.total = total  # type: ignore[method-assign]
    try:
        engine.step(shares(0)[rank or 0], Now(steps=1, learning_rate=1.0))
    except LuthierError as error:
        same = all(torch.equal(now, then) for now, then in zip(engine.tune.model.parameters(), before, strict=True))
        return Told({"what": error.what, "where": error.where, "same": same}, str(error))
    return Told({})


def _apart(when: str, rank: int) -> Told:
    """A technique for which each process makes a choice of its own: numbers at the start, others in mid-run, or what stands still."""

    def refresh(state: Any, services: Any) -> dict[Any, Refresh]:
        again = {one.place: one.index for one in services.trained()} if when == "later" and services.now.step == 1 else {}
        return {place: Refresh(index + rank, torch.full_like(index, -1)) for place, index in again.items()}

    def frozen(trained: Any, state: Any, now: Now) -> bool:
        return when == "still" and now.step == 1 and rank == 1 and "layers.0" in trained.name

    def choose(parts: Any, services: Any) -> dict[Any, Select]:
        return {
            place: Select("flat", torch.arange(3) + (rank if when == "start" else 0))
            for place in parts.select(target_modules="linear")
        }

    own = Part("own", "selective", {}, (Selective(choose, refresh=refresh), Freezing(frozen)))
    try:
        engine = engine_of(tune=[own], optimizer="sgd", now=Now(steps=STEPS))
        for step in range(3):
            engine.step(shares(0)[rank], Now(step=step, steps=STEPS, learning_rate=0.01))
    except LuthierError as error:
        return Told({}, str(error), error.fix)
    return Told({})


def stand(rank: int, meet: str, tasks: Any, told: Any) -> None:
    """One of the two: performs tasks until there are no more."""
    torch.set_num_threads(1)
    registry.add_folder(TOYS)
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=PATIENCE / 2)
    )
    while (task := tasks.get()) is not None:
        try:
            told.put((task["id"], rank, perform(task, rank)))
        except Exception:
            told.put((task["id"], rank, Told({}, traceback.format_exc())))
    dist.destroy_process_group()


class Pair:
    """Both processes, as the test sees them."""

    def __init__(self, tasks: list[Any], told: Any) -> None:
        self._tasks, self._told = tasks, told
        self._known: dict[tuple[str, int], Told] = {}

    def give(self, task: dict[str, Any]) -> None:
        """Let both perform a task, behind those given before."""
        for queue in self._tasks:
            queue.put(task)

    def ask(self, name: str) -> list[Told]:
        """What both say of a task."""
        while any((name, rank) not in self._known for rank in range(SIZE)):
            task, rank, told = self._told.get(timeout=PATIENCE)
            self._known[task, rank] = told
        return [self._known.pop((name, rank)) for rank in range(SIZE)]


@contextmanager
def standing(folder: Path) -> Iterator[Pair]:
    """Two processes for as long as they are needed."""
    # Both are forked from a process that has imported everything and done nothing yet.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    spawn: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        spawn.set_forkserver_preload([__name__])
    tasks: list[Any] = [spawn.Queue() for _ in range(SIZE)]
    told: Any = spawn.Queue()
    both = [spawn.Process(target=stand, args=(rank, str(folder / "meet"), tasks[rank], told)) for rank in range(SIZE)]
    for process in both:
        process.start()
    try:
        yield Pair(tasks, told)
        for queue in tasks:
            queue.put(None)
        for process in both:
            process.join(timeout=PATIENCE)
    finally:
        for process in both:
            if process.is_alive():
                process.terminate()
                process.join()
