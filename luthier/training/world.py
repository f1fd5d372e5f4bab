"""The processes of a run, and the sums over them. A run without a process group is a world of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

Plain = TypeVar("Plain")


@dataclass(frozen=True)
class World:
    """Size of the run and this process's number in it."""

    size: int = 1
    rank: int = 0

    @classmethod
    def current(cls) -> World:
        """The processes that a launcher (`accelerate launch`, torchrun) started; their group is set up by accelerate."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            PartialState(cpu=not torch.cuda.is_available())
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_world_size(), dist.get_rank())
        return cls()

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_numbers(self, values: list[float]) -> list[float]:
        """Sum plain numbers over the processes, in fp64."""
        if self.size == 1:
            return values
        # NCCL alone sums nothing that lies in the processor's memory.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total: list[float] = self.sum(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
        return total

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.sum_numbers([float(flag)])[0] > 0

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return max(self.gather_plain(number))

    def gather_plain(self, value: Plain) -> list[Plain]:
        """Everyone's plain value, in the order of the processes."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value)
        return everyone

    def from_first(self, value: Plain) -> Plain:
        """The first process's plain value, in all of them."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.gather_plain(None)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, value: dict[str, Tensor]) -> dict[str, Tensor]:
        """Concatenate tensors of unequal length over the processes, by name."""
        if self.size == 1:
            return value
        everyone: list[dict[str, Tensor]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everyone, value)
        return {name: torch.cat([one[name] for one in everyone]) for name in value}
