"""What stands at one module: deltas added to its output, taps, prompts, edits. One hook runs them in that order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from luthier.draws import drawing
from luthier.errors import LuthierError
from luthier.kinds import Place, Prompt, RepresentationEdit, Tensors, WeightDelta
from luthier.tune.standins import StandIns
from luthier.tune.taps import TapSpec, tap
from luthier.tune.trained import Trained

Owned = TypeVar("Owned", bound="Own")

HIDDEN = "hidden_states"
"""What models call the input of a sub-layer where they pass it by name."""


def _entering(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    entering: Tensor = arguments[0] if arguments else named[HIDDEN]
    return entering


def _cast(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None or values.dtype == dtype or not values.is_floating_point() else values.to(dtype)


HEAD = "head"
"""How a head's tensors are told from what else its technique trains."""


@dataclass(eq=False)
class Own:
    """One technique's trained tensors at one place."""

    slot: str
    place: Place | None
    trained: dict[str, Trained] = field(default_factory=dict)
    frozen: Tensors = field(default_factory=dict)
    """What belongs to the technique and does not train."""
    shared: Own | None = None
    """What all places of the technique have in common."""
    wide: frozenset[str] = frozenset()
    """Names of tensors that are never cast."""
    part: str = ""
    """Tells apart what a technique has at no place, such as a head beside a prompt."""

    @property
    def name(self) -> str:
        """What the names of its tensors begin with."""
        where = self.part if self.place is None else str(self.place)
        return f"{self.slot}/{where}" if where else self.slot

    @property
    def stands(self) -> bool:
        """Whether anything is here: a technique may have taken its tensors away."""
        return bool(self.trained or self.frozen)

    def tensors(self, dtype: torch.dtype | None = None) -> Tensors:
        """The tensors by name, cast to the type of the computation they join, but for those that stay wide."""
        found: Tensors = {name: one.leaf for name, one in self.trained.items()}
        found.update(self.frozen)
        before = {} if self.shared is None else self.shared.tensors(dtype)
        return before | {name: one if name in self.wide else _cast(one, dtype) for name, one in found.items()}

    def now(self: Owned) -> Owned:
        """The same with copies of the values as they are, none of which trains."""
        values = {name: one.clone() for name, one in self.masters().items()}
        return replace(self, trained={}, frozen=values, shared=None)

    def masters(self) -> Tensors:
        """The values, without a graph."""
        found = {} if self.shared is None else self.shared.masters()
        return {**found, **{name: one.master.detach() for name, one in self.trained.items()}, **self.frozen}


@dataclass(eq=False)
class Addition(Own):
    """A delta on a weight."""

    value: WeightDelta = None  # type: ignore[assignment]
    stacked: bool = False
    """Its weight is a stack of experts' matrices, and its own tensors are stacked alike, [E, ...]."""

    def delta(self, tensors: Tensors) -> Tensor:
        """The change of its weight, [O, I], or [E, O, I] of a stack of E matrices."""
        if not self.stacked:
            return self.value.delta(tensors)
        if self.value.pair is not None:
            down, up = self.value.pair
            return self.value.scale * tensors[up] @ tensors[down]
        return torch.stack([self.value.delta(one) for one in self._each(tensors)])

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor, float] | None:
        """The factors of its delta, down [R, I] and up [O, R], or [E, R, I] and [E, O, R] of a stack of E matrices, and what their product
        is scaled with; None: the delta is not low-rank."""
        if self.value.pair is not None:
            down, up = self.value.pair
            return tensors[down], tensors[up], self.value.scale
        if self.value.factors is None:
            return None
        if not self.stacked:
            return (*self.value.factors(tensors), 1.0)
        downs, ups = zip(*map(self.value.factors, self._each(tensors)), strict=True)
        return torch.stack(downs), torch.stack(ups), 1.0

    def _each(self, tensors: Tensors) -> Iterator[Tensors]:
        """The tensors of each matrix of a stack; what all places share is the same for all."""
        own = {*self.trained, *self.frozen}
        experts = len(next(tensors[name] for name in own))
        return ({name: one[expert] if name in own else one for name, one in tensors.items()} for expert in range(experts))


@dataclass(eq=False)
class Edit(Own):
    """An edit of a hidden state."""

    value: RepresentationEdit = None  # type: ignore[assignment]


@dataclass(eq=False)
class Site:
    """All that stands at one module."""

    module: nn.Module
    is_off: Callable[[], bool]
    keys: Callable[[], Tensor | None] = lambda: None
    """Keys for the draws of each token of the pass that runs; None where the run does not train."""
    additions: list[Addition] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    prompts: list[tuple[Own, Prompt]] = field(default_factory=list)
    taps: dict[str, tuple[Tensor, TapSpec]] = field(default_factory=dict)
    slices: dict[str, Trained] = field(default_factory=dict)
    """Some experts' matrices or biases of a stack that train themselves, by name."""
    handles: list[Any] = field(default_factory=list)
    ids: Tensor | None = None
    see: Callable[[Tensor], Tensor] | None = None
    """What the weight [O, I] becomes before it multiplies, with the deltas on it; none: it is what it is, and deltas act beside it."""
    stand_ins: StandIns | None = None
    """Of a module that is no linear map: what it reads in the place of its parameters, with the deltas in them."""

    def attach(self) -> None:
        """Put the hooks on the module."""
        if isinstance(self.module, nn.Embedding):
            self.handles.append(self.module.register_forward_pre_hook(self._before_embedding))
        self.handles.append(self.module.register_forward_pre_hook(self._before, with_kwargs=True))
        self.handles.append(self.module.register_forward_hook(self._after, with_kwargs=True))

    def look_through(self, see: Callable[[Tensor], Tensor]) -> None:
        """Let a linear map multiply with what `see` makes of its weight and all deltas on it.

        Raises:
            LuthierError: this is no plain linear map.
        """
        if type(self.module) is not nn.Linear:
            raise LuthierError(f"the weight of a {type(self.module).__name__} cannot be seen as another", fix="choose linear maps")
        plain, self.see = self.module.forward, see

        def forward(x: Tensor) -> Tensor:
            if self.see is None or self.is_off():
                return plain(x)
            # Made again in backward: no dense weight is kept for each pass.
            return checkpoint(self._multiplied, x, use_reentrant=False)  # type: ignore[no-any-return]

        self.module.forward = forward  # type: ignore[assignment,method-assign]

    def stand_in(self, transposed: frozenset[str]) -> None:
        """Let a module that is no linear map, such as a router or experts, compute with its parameters and all deltas on them, and with
        the slices of them that train.

        Args:
            transposed: modules that store inputs before outputs.
        """
        if self.stand_ins is None:
            self.stand_ins = StandIns(self.module, self.is_off, lambda: self.additions, self.slices.values, transposed)

    def _multiplied(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(self.module.weight), self.module.bias)  # type: ignore[arg-type]

    def weight(self, live_OI: Tensor) -> Tensor:
        """What multiplies: the weight with the deltas on it, as it is seen."""
        for addition in self.additions:
            delta_OI = addition.delta(addition.tensors(live_OI.dtype))
            assert addition.place is not None
            before = addition.place.start or 0
            live_OI = live_OI + functional.pad(delta_OI, (0, 0, before, len(live_OI) - before - len(delta_OI)))
        return live_OI if self.see is None else self.see(live_OI)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.see is not None:
            self.see = None
            del self.module.forward
        if self.stand_ins is not None:
            self.stand_ins.detach()
            self.stand_ins = None

    def now(self) -> Site:
        """A copy on no module, which goes on to do what stands here does now."""
        additions, edits = [one.now() for one in self.additions], [one.now() for one in self.edits]
        return Site(self.module, lambda: False, additions=additions, edits=edits)

    def run(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What a module that computes `compute` returns with all this."""
        changed = self._before(self.module, (x,), {})
        x = x if changed is None else changed[0][0]
        y = compute(x)
        after = self._after(self.module, (x,), {}, y)
        return y if after is None else after

    def _before_embedding(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        # Virtual ids are negative: the table must not be asked for them.
        self.ids = arguments[0]
        return (arguments[0].clamp(min=0), *arguments[1:])

    def _before(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        edits = [edit for edit in self.edits if edit.value.of == "input" and edit.stands]
        if self.is_off() or not edits:
            return None
        x = _entering(arguments, named)
        for edit in edits:
            with drawing(self.keys(), edit.name, told=edit.value.draws):
                x = edit.value.apply(edit.tensors(x.dtype), x, x)
        return ((x, *arguments[1:]), named) if arguments else (arguments, {**named, HIDDEN: x})

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        ids, self.ids = self.ids, None
        if self.is_off():
            return None
        beside = self.additions if self.see is None and self.stand_ins is None else []
        if not (beside or self.taps or self.prompts or self.edits):
            return None
        y = output[0] if isinstance(output, tuple) else output
        x = _entering(arguments, named) if ids is None else ids
        # What is seen of the weight, or stands in for it, has the deltas in it.
        for addition in beside:
            with drawing(self.keys(), addition.name, told=addition.value.draws):
                y = self._add(addition, x, y)
        # A tap needs the gradient of what the weight gave: it stands before whatever changes that.
        for leaf, spec in self.taps.values():
            if leaf.requires_grad and (spec.wanted is None or spec.wanted()):
                y = tap(y, x, leaf, spec)
        for own, prompt in self.prompts:
            y = prompt.apply(own.tensors(y.dtype), x, y)
        for edit in self.edits:
            if edit.value.of == "output" and edit.stands:
                with drawing(self.keys(), edit.name, told=edit.value.draws):
                    y = self._edit(edit, x, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _add(self, addition: Addition, x: Tensor, y: Tensor) -> Tensor:
        change = addition.value.apply(addition.tensors(y.dtype), x.to(y.dtype) if x.is_floating_point() else x)
        place = addition.place
        if place is None or place.start is None:
            return y + change
        part = torch.zeros_like(y)
        part[..., place.start : place.stop] = change
        return y + part

    def _edit(self, edit: Edit, x: Tensor, y: Tensor) -> Tensor:
        tensors, place = edit.tensors(y.dtype), edit.place
        if x.dim() > y.dim() > 1 and x.numel() // x.shape[-1] == y.numel() // y.shape[-1]:
            # Some experts return the tokens of all rows one behind the other (Llama 4).
            return self._edit(edit, x, y.view(*x.shape[:-1], y.shape[-1])).view(y.shape)
        if place is None or place.start is None:
            return edit.value.apply(tensors, x, y)
        new = edit.value.apply(tensors, x, y[..., place.start : place.stop])
        return torch.cat([y[..., : place.start], new, y[..., place.stop :]], dim=-1)
