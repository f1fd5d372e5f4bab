"""A run of several processes, without any: what is asked of the process group, and what a run of one never asks."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.training import agreement, world
from luthier.training.world import World
from tests.toys.helpers import model_of


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group in which the other processes have what this one has."""

    def all_reduce(value: torch.Tensor) -> None:
        value.mul_(2)

    def all_gather_object(everyone: list[Any], value: Any) -> None:
        everyone[:] = [value] * len(everyone)

    def broadcast_object_list(held: list[Any], src: int) -> None:
        held[:] = [f"of process {src}"]

    for one in (all_reduce, all_gather_object, broadcast_object_list):
        monkeypatch.setattr(world.dist, one.__name__, one)
    monkeypatch.setattr(world.dist, "get_backend", lambda: "gloo")


def test_two_processes(group: None) -> None:
    one = World(2, 1)
    assert one.sum(torch.tensor([1.5, 2.0])).tolist() == [3.0, 4.0] and one.sum_numbers([1.5, -2.0]) == [3.0, -4.0]
    assert one.any(True) and not one.any(False)
    assert one.max(5) == 5 and one.gather_plain("a") == ["a", "a"] and one.from_first("mine") == "of process 0"
    assert one.gather({"x": torch.tensor([1, 2])})["x"].tolist() == [1, 2, 1, 2]
    one.wait()
    assert World(2, 0).is_first and not one.is_first


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "dist", SimpleNamespace())
    one, values = World(), torch.tensor([1.5])
    assert one.sum(values) is values and values.tolist() == [1.5] and one.sum_numbers([0.1]) == [0.1]
    assert one.any(True) and not one.any(False) and one.max(3) == 3 and one.is_first
    assert one.gather_plain("a") == ["a"] and one.from_first("mine") == "mine"
    assert one.gather({"x": values})["x"] is values
    one.wait()


@pytest.mark.parametrize(("size", "initialized", "begun"), [(None, False, 0), ("1", False, 0), ("2", False, 1), ("2", True, 0)])
def test_a_group_is_begun_where_a_launcher_started_several(
    size: str | None, initialized: bool, begun: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(world, "PartialState", lambda **options: calls.append(options))
    monkeypatch.setattr(world.dist, "is_initialized", lambda: initialized)
    monkeypatch.setattr(world.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(world.dist, "get_rank", lambda: 1)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert World.current() == (World(2, 1) if initialized else World())
    assert len(calls) == begun


class Beside:
    """Two processes, of which the other has chosen as this one, or not."""

    def __init__(self, **others: str) -> None:
        self.size, self.others = 2, others

    def gather_plain(self, value: dict[str, str]) -> list[dict[str, str]]:
        self.told = value
        return [value, {**value, **self.others}]


def told(run: Any, *, values: bool) -> dict[str, str]:
    """What this process tells the others of what it trains."""
    beside: Any = Beside()
    agreement.check(beside, run.tune, values=values)
    found: dict[str, str] = beside.told
    return found


def test_processes_that_train_different_numbers_are_stopped(engine: Any) -> None:
    run = engine(["lora", "half"], model=model_of())
    assert set(told(run, values=True)) == {"lora", "half"}
    for other in (Beside(half="another choice"), Beside(third="one more")):
        with pytest.raises(LuthierError, match="trains numbers that differ between the processes"):
            agreement.check(other, run.tune, values=True)  # type: ignore[arg-type]
    lone: Any = SimpleNamespace(size=1)
    agreement.check(lone, run.tune, values=True)


def test_what_processes_compare(engine: Any, now: Now) -> None:
    """Which numbers stand still, always; the numbers themselves where they are asked for, other than whole tensors of the model."""
    run = engine(["lora", "full"], model=model_of())
    before = {values: told(run, values=values) for values in (False, True)}
    with torch.no_grad():
        for one in run.tune.trained.values():
            one.master.add_(0.5)
    after = {values: told(run, values=values) for values in (False, True)}
    assert after[False] == before[False] and after[True]["full"] == before[True]["full"]
    assert after[True]["lora"] != before[True]["lora"]
    run.tune.trained[next(name for name in run.tune.trained if name.startswith("lora"))].still = True
    assert told(run, values=False)["lora"] != before[False]["lora"]


def test_the_processes_of_a_run_cannot_be_changed() -> None:
    one: Any = World(2, 1)
    with pytest.raises(FrozenInstanceError):
        one.rank = 0
