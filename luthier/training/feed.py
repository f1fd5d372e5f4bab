"""Which rows go into which step. A pure function of rows, seed and step, so that a resumed run needs only the step's number."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from luthier.kinds import Batch
from luthier.rows.batches import Plan, collate, padding_share, plan_epoch
from luthier.rows.encode import Encoded
from luthier.training.world import World


@dataclass
class Feed:
    """The encoded rows in the order they will be seen.

    Args:
        rows: encoded training rows.
        epochs: passes over the rows; the last may be a part of one.
        steps: optimizer steps, instead of epochs.
        batch_tokens, batch_rows: the size of a step, one of them.
        micro_batch_tokens: most tokens of a forward pass, padding counted.
    """

    rows: Sequence[Encoded]
    seed: int
    micro_batch_tokens: int
    epochs: float = 1.0
    steps: int | None = None
    batch_tokens: int | None = None
    batch_rows: int | None = None
    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _epochs: list[Plan] = field(default_factory=list)

    def epoch(self, number: int) -> Plan:
        """The steps of one epoch."""
        while len(self._epochs) <= number:
            self._epochs.append(self._plan(len(self._epochs)))
        return self._epochs[number]

    def _plan(self, number: int) -> Plan:
        return plan_epoch(
            [len(row) for row in self.rows],
            micro_batch_tokens=self.micro_batch_tokens,
            batch_tokens=None if self.batch_rows is not None else self.batch_tokens,
            batch_rows=self.batch_rows,
            seed=self.seed,
            epoch=number,
            world_size=self.world.size,
            rank=self.world.rank,
        )

    def total(self) -> int:
        """All optimizer steps."""
        if self.steps is not None:
            return self.steps
        whole, part = divmod(self.epochs, 1.0)
        steps = sum(len(self.epoch(number)) for number in range(int(whole)))
        return max(1, steps + math.ceil(part * len(self.epoch(int(whole)))) if part else steps)

    def _find(self, step: int) -> tuple[int, int]:
        number = 0
        while True:
            ends = list(accumulate(len(self.epoch(n)) for n in range(number + 1)))
            if step < ends[-1]:
                number = bisect_right(ends, step)
                return number, step - (ends[number - 1] if number else 0)
            number += 1

    def at(self, step: int) -> tuple[float, list[Batch]]:
        """The epoch, with its fraction, before a step, and the step's micro-batches for this process."""
        number, within = self._find(step)
        plan = self.epoch(number)
        batches = [collate([self.rows[i] for i in group]).to(self.device) for group in plan[within] if group]
        return number + within / len(plan), batches

    def padding(self) -> float:
        """The share of padding in the first epoch."""
        return padding_share(self.epoch(0), [len(row) for row in self.rows])

    def tokens(self) -> tuple[int, int]:
        """Real and supervised tokens of the whole run, over all processes."""
        per_epoch = sum(len(row) for row in self.rows), sum(sum(row.supervised) for row in self.rows)
        share = self.epochs if self.steps is None else self.steps / max(1, len(self.epoch(0)))
        return round(per_epoch[0] * share), round(per_epoch[1] * share)
