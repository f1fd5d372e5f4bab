"""What is minimized: terms that sum, weights that say how much each token counts, and the units that the loop divides by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from luthier import draws, logprobs
from luthier.errors import LuthierError
from luthier.kinds import Batch, Column, Now, Services, State, Tensors, Term, TokenLoss, TokenWeight, View
from luthier.training.services import evaluating, view_of
from luthier.training.world import World
from luthier.tune import Tune
from luthier.tune.sites import Own


def as_term(value: Term | TokenLoss) -> Term:
    """Every objective is a term in the end."""
    if isinstance(value, Term):
        return value
    loss = value.loss

    def total(view: View, own: Tensors) -> Tensor:
        return (loss(view) * view.weight_N).sum()

    return Term(total, columns=value.columns, weight=value.weight)


@dataclass
class Minimized:
    """One term under its slot."""

    slot: str
    term: Term
    state: State
    own: Own | None = None


@dataclass
class Weighted:
    """One token weight under its slot."""

    slot: str
    weight: TokenWeight
    state: State


class Sums(NamedTuple):
    """What one micro-batch adds to the step."""

    loss: Tensor
    """All terms, each divided by its units of the whole step; the gradient flows from here."""
    parts: dict[str, float]
    """Each term's share of the loss."""
    nll: float
    """Plain negative log-likelihood, summed over the targets."""
    weight: float
    """Token weights, summed."""


@dataclass
class Objective:
    """All terms and token weights of a run."""

    terms: list[Minimized]
    weights: list[Weighted] = field(default_factory=list)

    def start(self, tune: Tune, services_of: Callable[[str], Services]) -> None:
        """Make the terms' own trained tensors."""
        for one in self.terms:
            if one.term.start is not None:
                one.own = tune.add_free(one.slot, one.term.start(services_of(one.slot)))

    def columns(self) -> tuple[Column, ...]:
        """The union of what terms and weights read; the plain loss is always among them."""
        wanted: list[str | Column] = ["nll"]
        for one in self.terms:
            wanted += one.term.columns
        for other in self.weights:
            if other.weight.weigh is not None:
                wanted += other.weight.columns
        return logprobs.resolve(wanted)

    def needs_base(self) -> bool:
        """Whether any column compares with the base."""
        looked = [c for one in self.weights for c in one.weight.columns]
        return any(c.reference for c in (*self.columns(), *logprobs.resolve(looked)))

    def look(self, tune: Tune, batches: Sequence[Batch], now: Now, world: World) -> list[Tensor] | None:
        """Rules over the whole step: one pass without gradients, gathered over processes and sorted by row id and position, so
        that neither the split into micro-batches nor the number of processes matters. Returns keep weights by micro-batch."""
        rules = [one for one in self.weights if one.weight.look is not None]
        if not rules:
            return None
        wanted = logprobs.resolve([column for one in rules for column in one.weight.columns])
        tables = []
        for batch in batches:
            with evaluating(tune.model):
                tables.append(_table(view_of(tune, batch, wanted, now)))
        whole_numbers = {name: torch.zeros(0, dtype=torch.int64) for name in ("row", "position")}
        empty = {**whole_numbers, **{column.name: torch.zeros(0) for column in wanted}}
        local = {name: torch.cat([t[name] for t in tables]) for name in tables[0]} if tables else empty
        whole = world.gather(local)
        order = _sorted(whole)
        table = {name: values[order] for name, values in whole.items()}
        keep = torch.ones(len(order), dtype=torch.float32)
        for rule in rules:
            assert rule.weight.look is not None
            keep = keep * rule.weight.look(table, now).to(keep.dtype)
        place = {(int(r), int(p)): i for i, (r, p) in enumerate(zip(table["row"], table["position"], strict=True))}
        return [
            keep[torch.tensor([place[int(r), int(p)] for r, p in zip(t["row"], t["position"], strict=True)], dtype=torch.int64)]
            for t in tables
        ]

    def units(self, batches: Sequence[Batch], keeps: list[Tensor] | None, world: World) -> list[float]:
        """Each term's units in the whole step, over micro-batches and processes."""
        return world.sum_numbers([sum(self._count(one.term, batches, keeps)) for one in self.terms])

    def idle(self, units: Sequence[float]) -> bool:
        """Whether a step has nothing to learn from: penalties alone, which count 1 a step, must not move a model."""
        data = [unit for one, unit in zip(self.terms, units, strict=True) if one.term.unit != "step"]
        return not any(data or units)

    def _count(self, term: Term, batches: Sequence[Batch], keeps: list[Tensor] | None) -> list[float]:
        if term.count is not None:
            return [term.count(batch) for batch in batches]
        if term.unit == "step":
            return [1.0] if batches else []
        if term.unit == "row":
            return [float(len(batch.row_ids)) for batch in batches]
        counts = [one.weight.count for one in self.weights if one.weight.count is not None]
        if len(counts) + (keeps is not None) > 1:
            slots = ", ".join(one.slot for one in self.weights if one.weight.count or one.weight.look)
            raise LuthierError(f"{slots} count tokens differently", where="token_weight", mend="use one of them")
        if counts:
            return [counts[0](batch) for batch in batches]
        if keeps is not None:
            return [float((keep != 0).sum()) for keep in keeps]
        return [float(batch.supervised) for batch in batches]

    def total(
        self,
        tune: Tune,
        batch: Batch,
        units: Sequence[float],
        now: Now,
        *,
        first: bool,
        read: Batch | None = None,
        keep_N: Tensor | None = None,
        services_of: Callable[[str], Services],
    ) -> Sums:
        """One micro-batch's part of the step's loss, divided by the units of the whole step. The model reads `read`, if given."""
        hidden_wanted = any(one.term.hidden for one in self.terms)
        view = view_of(tune, batch, self.columns(), now, read=read, keep_hidden=hidden_wanted)
        weight_N = torch.ones_like(view["nll"].detach()) if keep_N is None else keep_N.to(view["nll"])
        with torch.no_grad():
            for one in self.weights:
                if one.weight.weigh is not None:
                    view.services = services_of(one.slot)
                    weight_N = weight_N * one.weight.weigh(view.for_technique(one.state)).detach()
        loss = view["nll"].new_zeros(())
        parts: dict[str, float] = {}
        for minimized, unit in zip(self.terms, units, strict=True):
            if unit == 0 or (minimized.term.unit == "step" and not first):
                continue
            view.services = services_of(minimized.slot)
            own = minimized.own.tensors() if minimized.own is not None else {}
            total = minimized.term.total(view.for_technique(minimized.state, weight_N), own)
            share = total * (minimized.term.weight / unit)
            loss = loss + share
            parts[minimized.slot] = parts.get(minimized.slot, 0.0) + float(share.detach())
        return Sums(loss, parts, float(view["nll"].detach().double().sum()), float(weight_N.double().sum()))


def _table(view: View) -> dict[str, Tensor]:
    rows = torch.tensor([draws.seed_of(row) for row in view.batch.row_ids], dtype=torch.int64)
    here = {"row": rows[view.row_N.cpu()], "position": view.position_N.cpu()}
    return {**here, **{name: column.float().cpu() for name, column in view.columns.items()}}


def _sorted(table: dict[str, Tensor]) -> Tensor:
    by_position = table["position"].argsort(stable=True)
    return by_position[table["row"][by_position].argsort(stable=True)]
