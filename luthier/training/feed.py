"""Which rows go into which step. A pure function of rows, seed and step, so that a resumed run needs only the step's number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, NamedTuple

import torch

from luthier.kinds import Batch
from luthier.rows.batches import Plan, collate, padding_share, plan_epoch
from luthier.rows.encode import Encoded, EncodedRows, Sizes, renamed
from luthier.rows.mixture import Mixture
from luthier.training.world import World


class _Epoch(NamedTuple):
    rows: Plan
    copies: Plan | None
    """How often each row already came in this epoch; None where every row comes once."""


@dataclass
class Feed:
    """The encoded rows in the order they will be seen.

    Args:
        rows: encoded training rows.
        mixture: which rows an epoch takes; None: every row once.
        epochs: passes over the rows; the last may be a part of one.
        steps: optimizer steps, instead of epochs.
        batch_tokens, batch_rows: the size of a step, one of them.
        micro_batch_tokens: most tokens of a forward pass, padding counted.
        packed: rows run without padding.
        shared: what rows of a group begin with is run once.
    """

    rows: EncodedRows
    seed: int
    micro_batch_tokens: int
    epochs: float = 1.0
    steps: int | None = None
    batch_tokens: int | None = None
    batch_rows: int | None = None
    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mixture: Mixture | None = None
    packed: bool = False
    shared: bool = False
    _epochs: dict[int, _Epoch] = field(default_factory=dict)
    _steps: dict[int, int] = field(default_factory=dict)

    def pack(self, *, shared: bool = False) -> None:
        """Run rows without padding from here on, and what rows of a group begin with once if it is `shared`: more of them fit into a
        micro-batch."""
        self.packed, self.shared = True, shared
        self._epochs.clear()

    def limit(self, tokens: int) -> None:
        """Cut steps into micro-batches of at most so many tokens from here on; which rows share a step stays the same."""
        self.micro_batch_tokens = tokens
        self._epochs.clear()

    def epoch(self, number: int) -> Plan:
        """The steps of one epoch, as places of rows."""
        return self._epoch(number).rows

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            # Two at most: the first, which estimates look at, and the one that is being trained on.
            for other in [one for one in self._epochs if one]:
                del self._epochs[other]
            self._epochs[number] = self._planned(number)
            self._steps[number] = len(self._epochs[number].rows)
        return self._epochs[number]

    def _planned(self, number: int) -> _Epoch:
        sizes = self.rows.sizes
        if self.mixture is None:
            return _Epoch(self._plan(sizes, number), None)
        drawn = self.mixture.epoch(number)
        plan = self._plan(sizes.take([one.row for one in drawn]), number)
        return _Epoch(_looked_up(plan, [one.row for one in drawn]), _looked_up(plan, [one.copy for one in drawn]))

    def _plan(self, sizes: Sizes, number: int) -> Plan:
        return plan_epoch(
            sizes.lengths,
            tokens=sizes.tokens,
            members=sizes.members,
            run=self.run(sizes),
            micro_batch_tokens=self.micro_batch_tokens,
            batch_tokens=None if self.batch_rows is not None else self.batch_tokens,
            batch_rows=self.batch_rows,
            seed=self.seed,
            epoch=number,
            world_size=self.world.size,
            rank=self.world.rank,
            packed=self.packed,
        )

    def run(self, sizes: Sizes) -> Sequence[int]:
        """Tokens that rows of these sizes run, without padding."""
        return sizes.run if self.shared and sizes.run else sizes.tokens

    def _length(self, number: int) -> int:
        """Steps of one epoch."""
        if number not in self._steps:
            self._epoch(number)
        return self._steps[number]

    def total(self) -> int:
        """All optimizer steps."""
        if self.steps is not None:
            return self.steps
        whole, part = divmod(self.epochs, 1.0)
        steps = sum(self._length(number) for number in range(int(whole)))
        return max(1, steps + math.ceil(part * self._length(int(whole))) if part else steps)

    def _find(self, step: int) -> tuple[int, int]:
        number = 0
        while step >= self._length(number):
            step -= self._length(number)
            number += 1
        return number, step

    def at(self, step: int) -> tuple[float, list[Batch]]:
        """The epoch, with its fraction, before a step, and the step's micro-batches for this process."""
        number, within = self._find(step)
        rows, copies = self._epoch(number)
        groups = zip(rows[within], copies[within] if copies is not None else repeat(repeat(0)), strict=False)
        batches = [collate(list(map(self._row, group, copy))).to(self.device) for group, copy in groups if group]
        return number + within / len(rows), batches

    def _row(self, place: int, copy: int) -> Encoded:
        row = self.rows.rows[place]
        # Draws follow from a row's id, and two copies of a row should not share theirs.
        return renamed(row, f"{row.id}#{copy + 1}") if copy else row

    def padding(self) -> float:
        """The share of padding in the first epoch."""
        if self.packed:
            return 0.0
        return padding_share(self.epoch(0), self.rows.sizes.lengths, tokens=self.rows.sizes.tokens, members=self.rows.sizes.members)

    def tokens(self) -> tuple[int, int]:
        """Real and supervised tokens of the whole run, over all processes; where steps are given, as if all epochs had as many."""
        if self.steps is not None:
            whole, left = divmod(self.steps, max(1, self._length(0)))
        else:
            whole = int(self.epochs)
            left = self.total() - sum(self._length(number) for number in range(whole))
        sizes = self.rows.sizes
        if self.mixture is None:
            tokens, targets = self.rows.tokens, self.rows.supervised_tokens
        else:
            places = [one.row for one in self.mixture.epoch(0)]
            tokens, targets = sum(sizes.tokens[i] for i in places), sum(sizes.targets[i] for i in places)
        part = self._first_rows(whole, left)
        return whole * tokens + sum(sizes.tokens[i] for i in part), whole * targets + sum(sizes.targets[i] for i in part)

    def _first_rows(self, number: int, steps: int) -> list[int]:
        """The rows of an epoch's first steps, of all processes."""
        if not steps:
            return []
        plan = replace(self, world=World(), _epochs={}, _steps={}).epoch(number)
        return [row for step in plan[:steps] for group in step for row in group]

    def rows_per_step(self) -> float:
        """Rows of an optimizer step, groups once, over all processes: the mean of the first epoch."""
        steps = self._length(0)
        return len(self._first_rows(0, steps)) / steps

    def shares(self) -> list[dict[str, Any]]:
        """What each source of a mixture should be and is, over all epochs that the run begins; empty without a mixture."""
        if self.mixture is None:
            return []
        return self.mixture.facts(self.rows.sizes, self._find(self.total() - 1)[0] + 1)


def _looked_up(plan: Plan, values: Sequence[int]) -> Plan:
    return [[[values[place] for place in group] for group in step] for step in plan]
