"""What stands at one module: deltas added to its output, taps, prompts, edits. One hook runs them in that order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luthier.kinds import Additive, HiddenEdit, Place, Prompt, Tensors
from luthier.tune.taps import TapSpec, tap
from luthier.tune.trained import Trained


@dataclass
class Own:
    """One technique's trained tensors at one place."""

    slot: str
    place: Place | None
    trained: dict[str, Trained] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype | None = None) -> Tensors:
        """The tensors by name, cast to the type of the computation they join."""
        return {
            name: one.leaf if dtype is None or one.leaf.dtype == dtype else one.leaf.to(dtype) for name, one in self.trained.items()
        }

    def masters(self) -> Tensors:
        """The values, without a graph."""
        return {name: one.master.detach() for name, one in self.trained.items()}


@dataclass
class Addition(Own):
    """A delta on a weight."""

    value: Additive = None  # type: ignore[assignment]


@dataclass
class Edit(Own):
    """An edit of a hidden state."""

    value: HiddenEdit = None  # type: ignore[assignment]


@dataclass
class Site:
    """All that stands at one module."""

    module: nn.Module
    is_off: Callable[[], bool]
    additions: list[Addition] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    prompts: list[tuple[Own, Prompt]] = field(default_factory=list)
    taps: dict[str, tuple[Tensor, TapSpec]] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    ids: Tensor | None = None

    def attach(self) -> None:
        """Put the hooks on the module."""
        if isinstance(self.module, nn.Embedding):
            self.handles.append(self.module.register_forward_pre_hook(self._before_embedding))
        self.handles.append(self.module.register_forward_hook(self._after))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _before_embedding(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        # Virtual ids are negative: the table must not be asked for them.
        self.ids = arguments[0]
        return (arguments[0].clamp(min=0), *arguments[1:])

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if self.is_off():
            return None
        y = output[0] if isinstance(output, tuple) else output
        x = arguments[0] if self.ids is None else self.ids
        self.ids = None
        for addition in self.additions:
            y = self._add(addition, x, y)
        # A tap needs the gradient of what the weight gave: it stands before whatever changes that.
        for leaf, spec in self.taps.values():
            if spec.wanted is None or spec.wanted():
                y = tap(y, x, leaf, spec)
        for own, prompt in self.prompts:
            y = prompt.apply(own.tensors(y.dtype), x, y)
        for edit in self.edits:
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
        if place is None or place.start is None:
            return edit.value.apply(tensors, x, y)
        new = edit.value.apply(tensors, x, y[..., place.start : place.stop])
        return torch.cat([y[..., : place.start], new, y[..., place.stop :]], dim=-1)
