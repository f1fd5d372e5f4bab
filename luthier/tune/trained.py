"""Every number that may change, as the run sees it: one tensor of values, and where in the model they live.

Optimizers move `master`; `push` writes it to the live weight. Whole tensors in fp32 are their own master; everything the model holds
in a narrower type has an fp32 copy of just the trained numbers. Added tensors (factors, prompts) are masters themselves and are cast
where they are used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.kinds import Form, Place, Select
from luthier.kinds.parts import outputs_first
from luthier.models.quantized import holder
from luthier.models.sharding import local


@dataclass(eq=False)
class Trained:
    """One trained tensor. Its name carries the technique's slot, so that two techniques at one place do not collide."""

    name: str
    slot: str
    place: Place | None
    form: Form
    index: Tensor | None
    master: Tensor
    """The values optimizers see."""
    leaf: Tensor
    """What autograd sees: the live parameter where a whole tensor trains, else the master."""
    rate: float = 1.0
    decay: bool = True
    changes: bool = False
    """The set of numbers may change in mid-run: optimizers keep an age for each entry."""
    axis: int = 0
    """The axis along which entries come and go."""
    start: Tensor | None = None
    """The values before training, where something will need them."""
    gradient: Tensor | None = None
    decays_to_start: bool = False
    still: bool = False
    """It is frozen in this step."""
    forgotten: bool = False
    """Its optimizer state was dropped meanwhile."""

    @property
    def anchor(self) -> Tensor | None:
        """What weight decay pulls towards; None: zero."""
        return self.start if self.decays_to_start else None

    @property
    def value(self) -> Tensor:
        """The master's numbers, in a loss: its gradient arrives here in the master's type."""
        if self.leaf is self.master or self.is_live:
            return self.leaf
        value: Tensor = _Value.apply(self.leaf, self)  # type: ignore[no-untyped-call]
        return value

    @property
    def numel(self) -> int:
        """Numbers that train."""
        return self.master.numel()

    @property
    def is_live(self) -> bool:
        """Whether the model's own numbers are the master: there is nothing to write back."""
        return self.form == "whole" and local(self.master).data_ptr() == local(self.leaf).data_ptr()

    def arrive(self, gradient: Tensor) -> None:
        """Add one micro-batch's gradient, in the master's type: sums in bf16 lose the small ones."""
        wide = torch.promote_types(self.master.dtype, torch.float32)
        if self.gradient is None:
            self.gradient = gradient.detach().to(wide)
        else:
            self.gradient.add_(gradient.detach())


class _Value(torch.autograd.Function):
    """A master in the place of the narrower leaf that stands for it in the model."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, one: Trained) -> Tensor:
        ctx.one, ctx.like = one, leaf
        return one.master.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.one.arrive(gradients[0])
        # The leaf hears of it all the same: who waits for its gradient must not wait for ever.
        return torch.zeros_like(ctx.like), None


def region(model: nn.Module, place: Place, transposed: frozenset[str]) -> Tensor:
    """The live values at a place as a view: [O, I] for linears however they are stored, only this place's rows of a fused one.

    Of a quantized weight it is a dequantized copy: writing to it changes nothing.
    """
    held = holder(model, place.parameter)
    if held is None:
        return region_of(model.get_parameter(place.parameter).data, place, transposed)
    return held.dequantized()[place.start : place.stop]


def region_of(values: Tensor, place: Place, transposed: frozenset[str]) -> Tensor:
    """The part of a parameter's values that is a place, as a view: [O, I] for linears however they are stored."""
    turned = outputs_first(values, place, transposed)
    return turned if place.start is None else turned[place.start : place.stop]


def read(values: Tensor, form: Form, index: Tensor | None) -> Tensor:
    """The selected numbers of a region, as a copy (the region itself for `whole`)."""
    if index is None:
        return values
    if form == "rows" or values.ndim == 1:
        return values[index]
    if form == "cols":
        return values[:, index]
    return values[index // values.shape[1], index % values.shape[1]]


def write(values: Tensor, form: Form, index: Tensor | None, new: Tensor) -> None:
    """Set the selected numbers of a region; the others are not touched."""
    new = new.to(values.dtype)
    if index is None:
        values.copy_(new)
    elif form == "rows" or values.ndim == 1:
        values[index] = new
    elif form == "cols":
        values[:, index] = new
    else:
        values[index // values.shape[1], index % values.shape[1]] = new


def check_select(place: Place, select: Select, values: Tensor) -> None:
    """Refuse a selection that does not fit its tensor, by name."""
    index, where = select.index, str(place)
    if select.form == "whole":
        if index is not None:
            raise LuthierError("a whole tensor takes no index", where=where, fix="use rows, cols or flat")
        return
    if index is None or index.ndim != 1 or index.dtype != torch.int64:
        raise LuthierError(f"`{select.form}` needs an index of whole numbers", where=where, fix="give a 1-D int64 tensor")
    if values.ndim == 1 and select.form == "cols":
        raise LuthierError("a vector has no columns", where=where, fix="select `rows` of a vector")
    size = {"rows": values.shape[0], "cols": values.shape[-1], "flat": values.numel()}[select.form]
    if len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= size:
        raise LuthierError(f"the index of `{select.form}` must lie in 0 to {size - 1} and not be empty", where=where)
    if len(index.unique()) != len(index):
        raise LuthierError("an index names a number twice", where=where, fix="every number at most once")


def decays(place: Place | None, master: Tensor) -> bool:
    """Whether weight decay belongs here: on matrices, never on norms, biases or other vectors."""
    if place is not None and (place.tensor.endswith("bias") or "norm" in place.role):
        return False
    return master.ndim > 1


def watch(trained: Trained, arrived: Callable[[Trained], None]) -> torch.utils.hooks.RemovableHandle:
    """Move each gradient off the leaf into the trained tensor as soon as it is complete for a micro-batch.

    `arrived` must hold neither the model nor the tensor, and the hook holds neither: Python's collector does not see through the
    hooks of tensors, so what they hold would stay in memory after the run.
    """
    known = weakref.ref(trained)

    def take(leaf: Tensor) -> None:
        one = known()
        if leaf.grad is not None and one is not None:
            one.arrive(leaf.grad)
            leaf.grad = None
            arrived(one)

    moves = trained.leaf.requires_grad
    trained.leaf.requires_grad_(True)
    handle = trained.leaf.register_post_accumulate_grad_hook(take)
    trained.leaf.requires_grad_(moves)
    return handle  # type: ignore[no-any-return]


def migrate(values: Tensor, axis: int, take: Tensor, old_size: int) -> Tensor:
    """Rearrange a tensor along an axis: entry i continues old entry `take[i]`, or starts at zero where that is -1."""
    if axis >= values.ndim or values.shape[axis] != old_size:
        return values
    kept = values.index_select(axis, take.clamp(min=0))
    shape = [1] * values.ndim
    shape[axis] = -1
    return kept * (take >= 0).reshape(shape).to(kept.dtype)
