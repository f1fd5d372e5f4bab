"""What is minimized: terms that sum, weights that say how much each token counts, and the units that the loop divides by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from luthier import machine
from luthier.columns import chunked
from luthier.errors import LuthierError
from luthier.kinds import (
    Batch,
    Column,
    Head,
    LossTerm,
    Now,
    OtherPass,
    PairLoss,
    Reference,
    Services,
    State,
    StepLoss,
    StepTable,
    Tensors,
    TokenLoss,
    TokenWeight,
    View,
)
from luthier.models.modes import evaluating
from luthier.training import pairs, readout, whole
from luthier.training.rules import gathered, places_in, pruned, table_of
from luthier.training.services import view_of
from luthier.training.whole import Slopes
from luthier.training.world import World
from luthier.tune import Tune
from luthier.tune.forward import EmbedChange
from luthier.tune.sites import Own


def as_term(value: LossTerm | TokenLoss | PairLoss | StepLoss, reference: Reference = pairs.BASE_REFERENCE) -> LossTerm:
    """Every objective is a term in the end.

    Args:
        value: the objective.
        reference: what answers are compared with, where it asks for that.
    """
    if isinstance(value, LossTerm):
        return value
    if isinstance(value, PairLoss):
        return pairs.as_term(value, reference)
    if isinstance(value, StepLoss):
        return whole.as_term(value, reference)
    loss = value.loss

    def total(view: View, own: Tensors) -> Tensor:
        return (loss(view) * view.weight_N).sum()

    return LossTerm(total, columns=value.columns, weight=value.weight, penalty=value.penalty, stored=value.stored)


@dataclass
class Minimized:
    """One term under its slot."""

    slot: str
    term: LossTerm
    state: State
    own: Own | None = None
    of_step: StepLoss | None = None
    """What it was lowered from, where that is a loss of the whole step."""
    slopes: Slopes | None = None
    """Of the step in progress, where it is."""

    def tensors(self) -> Tensors:
        """Its own trained tensors."""
        return self.own.tensors() if self.own is not None else {}


@dataclass
class Weighted:
    """One token weight under its slot."""

    slot: str
    weight: TokenWeight
    state: State


class Counted(NamedTuple):
    """What is said of a step's labels beside the loss. Everything adds up over micro-batches and processes."""

    nll: float = 0.0
    """Plain negative log-likelihood, summed over the labels."""
    weight: float = 0.0
    """Token weights, summed."""
    squares: float = 0.0
    """Squares of the token weights, summed."""
    kept: float = 0.0
    """Labels whose weight is not 0."""
    entropy: float = 0.0
    """Entropy of the model's distributions in nats, summed over the labels; 0 where nothing asked for it."""
    targets: float = 0.0
    """Labels that were run."""
    own: float = 0.0
    """Those of them that are the rows' own."""

    def plus(self, other: Counted) -> Counted:
        """Both together."""
        return Counted(*(one + two for one, two in zip(self, other, strict=True)))


class Noted(NamedTuple):
    """Numbers of which a mean is told. Both add up over micro-batches and processes."""

    total: float = 0.0
    numbers: float = 0.0

    def plus(self, other: Noted) -> Noted:
        """Both together."""
        return Noted(self.total + other.total, self.numbers + other.numbers)

    @property
    def mean(self) -> float:
        """The mean; 0 of none."""
        return self.total / max(self.numbers, 1.0)


class Sums(NamedTuple):
    """What one micro-batch adds to the step."""

    loss: Tensor
    """All terms, each divided by its units of the whole step; the gradient flows from here."""
    parts: dict[str, float]
    """Each term's share of the loss."""
    counted: Counted
    notes: dict[str, Noted]
    """What techniques log."""


class Looked(NamedTuple):
    """What rules over the whole step came to."""

    batches: list[Batch]
    """The micro-batches without the rows of which nothing is kept."""
    keeps: list[Tensor]
    """The weights [N] of their labels."""
    notes: dict[str, float]
    """What the rules log; the same on every process."""


@dataclass
class Objective:
    """All terms and token weights of a run."""

    terms: list[Minimized]
    weights: list[Weighted] = field(default_factory=list)
    reference: Reference = pairs.BASE_REFERENCE
    """What answers are compared with."""
    head: tuple[str, Head] | None = None
    """What reads whole rows, under its slot."""

    def start(self, tune: Tune, services_of: Callable[[str], Services]) -> None:
        """Make the head's and the terms' own trained tensors."""
        if self.head is not None:
            slot, head = self.head
            tune.add_head(slot, head, head.start(services_of(slot)))
        for one in self.terms:
            if one.term.start is not None:
                one.own = tune.add_free(one.slot, one.term.start(services_of(one.slot)), one.term.rate)

    @property
    def rules(self) -> list[Weighted]:
        """The weights that are rules over the whole step."""
        return [one for one in self.weights if one.weight.look is not None]

    @property
    def is_weighted(self) -> bool:
        """Whether labels count differently, so that the loss alone does not tell how training goes."""
        return bool(self.weights)

    def columns(self) -> tuple[Column, ...]:
        """The union of what terms and weights read; the plain loss is among them unless a head alone reads the rows, and beside weights
        the entropy."""
        # The output matrix of the language model is not run for nothing.
        of_tokens = self.head is None or self.is_weighted or any(one.term.columns for one in self.terms)
        wanted: list[str | Column] = ["nll"] if of_tokens else []
        for one in self.terms:
            wanted += one.term.columns
        for other in self.weights:
            if other.weight.weigh is not None:
                wanted += other.weight.columns
        return chunked.resolve([*wanted, "entropy"] if self.is_weighted else wanted)

    def _states(self) -> dict[str, State]:
        """The state of the technique that asks for another pass, by the pass's name."""
        return {one.name: asking.state for asking, columns in self._asking() for one in chunked.passes_of(columns)}

    def _asking(self) -> list[tuple[Minimized | Weighted, tuple[Column, ...]]]:
        """Every term and weight, with the columns that it reads."""
        terms = [(one, chunked.resolve(one.term.columns)) for one in self.terms]
        return [*terms, *((one, chunked.resolve(one.weight.columns)) for one in self.weights)]

    def others(self) -> tuple[OtherPass, ...]:
        """The other passes of which terms ask for hidden states."""
        return chunked.alike([one for minimized in self.terms for one in minimized.term.others])

    def models(self) -> dict[str, str]:
        """The other models that terms and weights compare with, by name, each with the slot of the first that does."""
        of_columns = [(asking.slot, one) for asking, columns in self._asking() for one in chunked.passes_of(columns)]
        of_terms = [(minimized.slot, one) for minimized in self.terms for one in minimized.term.others]
        return {one.model: slot for slot, one in reversed([*of_columns, *of_terms]) if one.model}

    def comparing(self) -> list[str]:
        """The slots whose terms and weights compare with the base."""
        return [asking.slot for asking, columns in self._asking() if any(one.at == "base" for one in chunked.passes_of(columns))]

    def readers(self, name: str) -> list[str]:
        """The slots whose terms and weights read a column."""
        return [asking.slot for asking, columns in self._asking() if any(column.name == name for column in columns)]

    def look(self, tune: Tune, batches: Sequence[Batch], now: Now, world: World, services_of: Callable[[str], Services]) -> Looked:
        """Rules over the whole step: one pass without gradients if they ask for columns, gathered over processes and sorted by row id
        and position, so that neither the split into micro-batches nor the number of processes matters. They take turns in their order,
        each on the labels that those before it keep, and their weights multiply.

        Raises:
            LuthierError: rows belong together, of which a rule could keep one alone.
        """
        if any(batch.groups for batch in batches):
            raise LuthierError(
                f"`{self.rules[0].slot}` chooses among the labels of a step, and these rows belong together",
                where="token_weight",
                fix="leave it out, or train on rows that stand alone",
            )
        wanted = chunked.resolve([column for one in self.rules for column in one.weight.columns])
        tables = []
        for batch in batches:
            with evaluating(tune.model):
                tables.append(table_of(tune, batch, wanted, now, self._states()))
        step, of_rows = gathered(tables, [column.name for column in wanted], world)
        keep = torch.ones(len(step["row"]), dtype=torch.float64)
        notes: dict[str, float] = {}
        for rule in self.rules:
            assert rule.weight.look is not None
            kept_L = (keep != 0).nonzero()[:, 0]
            services = services_of(rule.slot)
            table = StepTable(
                {column.name: step[column.name][kept_L] for column in wanted},
                row_M=step["row"][kept_L].unique(return_inverse=True)[1],
                position_M=step["position"][kept_L],
                of_rows={name: values[kept_L] for name, values in of_rows.items()},
                now=services.now,
                state=rule.state,
                services=services,
            )
            keep[kept_L] *= machine.widened(rule.weight.look(table))
            notes.update(table.notes)
        found = Looked([], [], notes)
        for batch, mine in zip(batches, tables, strict=True):
            left, left_N = pruned(batch, keep[places_in(step, mine)])
            if left.row_ids:
                found.batches.append(left)
                found.keeps.append(left_N)
        return found

    def units(self, batches: Sequence[Batch], keeps: list[Tensor] | None, world: World) -> list[tuple[float, ...]]:
        """Each term's units in the whole step, over micro-batches and processes: one number, or several where it counts several."""
        counts = [self._count(one.term, batches, keeps) for one in self.terms]
        widths = [len(several[0]) if several else 1 for several in counts]
        if any(one.term.count is not None for one in self.terms):
            # A process without rows cannot know how many numbers a term counts.
            widths = [max(several) for several in zip(*world.gather_plain(widths), strict=True)]
        sums = [[sum(one[k] for one in several) for k in range(width)] for several, width in zip(counts, widths, strict=True)]
        flat = iter(world.sum_numbers([number for several in sums for number in several]))
        return [tuple(next(flat) for _ in range(width)) for width in widths]

    def idle(self, units: Sequence[tuple[float, ...]]) -> bool:
        """Whether a step has nothing to learn from: penalties alone, which count 1 a step, must not move a model."""
        data = [unit for one, unit in zip(self.terms, units, strict=True) if one.term.unit != "step" and not one.term.penalty]
        return not any(number for several in data or units for number in several)

    def _count(self, term: LossTerm, batches: Sequence[Batch], keeps: list[Tensor] | None) -> list[tuple[float, ...]]:
        if term.unit != "group":
            batches = [batch.of_first() for batch in batches]
        counts = [one.weight.count for one in self.weights if one.weight.count is not None]
        if term.unit == "row":
            batches = [batch.own() for batch in batches]
            if counts:
                kept = [torch.stack([count(batch) > 0 for count in counts]).all(0).nonzero()[:, 0] for batch in batches]
                batches = [batch.take(chosen) for batch, chosen in zip(batches, kept, strict=True)]
        if term.count is not None:
            found = [term.count(batch) for batch in batches]
            return [one if isinstance(one, tuple) else (one,) for one in found]
        if term.unit == "step":
            return [(1.0,)] if batches else []
        if term.unit == "row":
            return [(float((batch.targets_by_row() > 0).sum()),) for batch in batches]
        if term.unit == "group":
            return [(float(len(batch.learnt_groups())),) for batch in batches]
        if len(counts) + (keeps is not None) > 1:
            slots = ", ".join(one.slot for one in self.weights if one.weight.count or one.weight.look)
            raise LuthierError(f"{slots} count tokens differently", where="token_weight", fix="use one of them")
        if counts:
            own = [batch.own() for batch in batches]
            virtual = [batch.supervised - mine.supervised for batch, mine in zip(batches, own, strict=True)]
            return [(float(counts[0](mine).sum()) + more,) for mine, more in zip(own, virtual, strict=True)]
        if keeps is not None:
            return [(float((keep != 0).sum()),) for keep in keeps]
        return [(float(batch.supervised),) for batch in batches]

    @property
    def looks_at_steps(self) -> bool:
        """Whether there is a loss of the whole step."""
        return any(one.of_step is not None for one in self.terms)

    def gather(
        self, batches: Sequence[Batch], see: Callable[[Batch], View], services_of: Callable[[str], Services], world: World
    ) -> None:
        """Prepare losses of the whole step: one pass over its micro-batches without gradients.

        Args:
            batches: this process's.
            see: what `total` will see of one.
            services_of: what a technique under a slot may ask.
            world: the processes.
        """
        wholes = [one for one in self.terms if one.of_step is not None]
        found: list[list[tuple[Batch, Tensor]]] = [[] for _ in wholes]
        with torch.no_grad():
            for batch in batches:
                view = see(batch)
                for one, mine in zip(wholes, found, strict=True):
                    mine.append((batch, self._numbers(one, view.for_technique(one.state, view.weight_N).of_own())))
        for one, mine in zip(wholes, found, strict=True):
            assert one.of_step is not None
            one.slopes = whole.slopes_of(one.of_step, mine, services_of(one.slot).now, world)

    def _numbers(self, one: Minimized, view: View) -> Tensor:
        assert one.of_step is not None
        return whole.value_of(one.of_step, view, one.tensors(), self.reference)

    def see(
        self,
        tune: Tune,
        batch: Batch,
        now: Now,
        *,
        read: Batch | None = None,
        embed: EmbedChange | None = None,
        keep_N: Tensor | None = None,
        services_of: Callable[[str], Services],
        trains: bool = True,
    ) -> View:
        """Run a micro-batch: its columns, and the weights of its labels. The arguments are those of `total`."""
        hidden_wanted = any(one.term.hidden for one in self.terms) or self.head is not None
        routers_wanted = any(one.term.routers for one in self.terms)
        view = view_of(
            tune,
            batch,
            self.columns(),
            now,
            read=read,
            embed=embed,
            remembered=self._states(),
            keep_hidden=hidden_wanted,
            keep_others=self.others(),
            keep_routed=routers_wanted,
            trains=trains,
        )
        if self.head is not None and tune.head is not None and view.hidden_BTD is not None:
            own, head = tune.head
            view.head_output_BK = readout.read(head, own.tensors(), view.hidden_BTD, batch, causal=tune.parts.causal)
        some = view.example()
        weight_N = some.new_ones(len(view.label_N)) if keep_N is None else keep_N.to(some)
        with torch.no_grad():
            for one in self.weights:
                if one.weight.weigh is not None:
                    view.services = services_of(one.slot)
                    view.now = view.services.now
                    weight_N = weight_N * _weighed(one.weight.weigh, view.for_technique(one.state), virtual=one.weight.virtual)
        view.weight_N = weight_N
        return view

    def total(
        self,
        tune: Tune,
        batch: Batch,
        units: Sequence[tuple[float, ...]],
        now: Now,
        *,
        first: bool,
        read: Batch | None = None,
        embed: EmbedChange | None = None,
        keep_N: Tensor | None = None,
        services_of: Callable[[str], Services],
        trains: bool = True,
    ) -> Sums:
        """One micro-batch's part of the step's loss, divided by the units of the whole step. The model reads `read`, if given, and of
        its embeddings [B, T, D] what `embed` makes of them. Techniques drop numbers if it `trains`."""
        view = self.see(tune, batch, now, read=read, embed=embed, keep_N=keep_N, services_of=services_of, trains=trains)
        loss = view.example().new_zeros(())
        parts: dict[str, float] = {}
        for minimized, unit in zip(self.terms, units, strict=True):
            if not any(unit) or (minimized.term.unit == "step" and not first):
                continue
            view.services = services_of(minimized.slot)
            view.now = view.services.now
            seen = view.for_technique(minimized.state, view.weight_N)
            seen = seen if minimized.term.unit == "group" else seen.of_first()
            seen = seen.of_own() if minimized.term.unit in ("row", "group") else seen
            total = self._sum(tune, minimized, seen, first=first)
            # What has no unit in the whole step adds nothing.
            each = total.new_tensor([minimized.term.weight / one if one else 0.0 for one in unit])
            share = (total.flatten() * each).sum()
            loss = loss + share
            parts[minimized.slot] = parts.get(minimized.slot, 0.0) + share.item()
        notes = {name: Noted(machine.total(noted), float(len(noted))) for name, noted in view.notes.items()}
        return Sums(loss, parts, _counted(view.of_first()), notes)

    def _sum(self, tune: Tune, one: Minimized, view: View, *, first: bool) -> Tensor:
        """A term's sum over a micro-batch."""
        if one.of_step is None:
            return one.term.total(view, one.tensors())
        numbers = self._numbers(one, view)
        if tune.only_shapes:
            return numbers.sum()
        if one.slopes is None:
            raise RuntimeError("a loss of the whole step was not gathered before its micro-batches run")
        return whole.part(one.slopes, view, numbers, first=first)


def _weighed(weigh: Callable[[View], Tensor], view: View, *, virtual: bool) -> Tensor:
    """The weights [N] of the labels; those of virtual tokens are 1 unless the weight is for them, too. No graph is made here."""
    seen = view if virtual else view.of_own()
    found = weigh(seen)
    return found if seen is view else torch.ones_like(view["nll"]).masked_scatter(view.is_own, found.to(view["nll"]))


def _counted(view: View) -> Counted:
    if "nll" not in view.columns:
        return Counted()
    weight_N = view.weight_N
    wide_N = machine.widened(weight_N)
    entropy_N = view.columns.get("entropy")
    return Counted(
        nll=machine.total(view["nll"]),
        weight=float(wide_N.sum()),
        squares=float(wide_N.square().sum()),
        kept=machine.total(weight_N != 0),
        entropy=0.0 if entropy_N is None else machine.total(entropy_N),
        targets=float(len(weight_N)),
        own=float(view.is_own.sum()),
    )
