"""How a change of one parameter is stored: dense, sparse, or low-rank. Each form can be spread out, scaled, and added.

Dense and sparse changes are differences, so that deltas can be added and scaled. A difference alone is not exact:
`base + (tuned - base)` need not round to `tuned`. For most numbers it does (always where the two are within a factor
of two of each other, by Sterbenz' lemma); the others are found when the change is made, and kept beside it with both
their values, as corrections.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

Factor: TypeAlias = "float | Tensor"
"""A number, or one for each output, shaped to be multiplied with the stored parameter."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Corrections:
    """Entries where adding or subtracting the difference rounds to another number than it should, with both numbers."""

    index: Tensor
    """Flat, [K]."""
    before: Tensor
    """What the base holds, [K]."""
    after: Tensor
    """What the tuned model holds, [K]."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A change of every entry, in the layout of the stored parameter."""

    change: Tensor
    corrections: Corrections | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.change.shape

    def spread(self) -> Tensor:
        """The change of every entry."""
        return self.change

    def times(self, factor: Factor) -> Dense:
        """The change scaled; corrections hold for the unscaled one alone."""
        return Dense(self.change * factor)

    def add_to(self, values: Tensor, sign: int) -> None:
        """Add (1) or subtract (-1) the change in place, computed in the wider of the two types."""
        values = torch.atleast_1d(values)
        exact = _corrected(values, self.corrections, sign)
        change = self.change.to(values.device)
        values.copy_(values.to(torch.promote_types(values.dtype, change.dtype)) + sign * change)
        _correct(values, exact)


@dataclass(frozen=True, eq=False)
class Sparse:
    """A change of some entries."""

    index: Tensor
    """Flat in the layout of the stored parameter, [K]."""
    change: Tensor
    """[K]."""
    shape: torch.Size
    """Of the parameter."""
    corrections: Corrections | None = None

    def spread(self) -> Tensor:
        """The change of every entry."""
        spread = torch.zeros(self.shape.numel(), dtype=self.change.dtype)
        spread[self.index.long()] = self.change
        return spread.reshape(self.shape)

    def times(self, factor: Factor) -> Sparse:
        """The change scaled; corrections hold for the unscaled one alone."""
        if isinstance(factor, Tensor):
            factor = factor.expand(self.shape)[torch.unravel_index(self.index.long(), self.shape)]
        return Sparse(self.index, self.change * factor, self.shape)

    def add_to(self, values: Tensor, sign: int) -> None:
        """Add (1) or subtract (-1) the change in place, computed in the wider of the two types."""
        values = torch.atleast_1d(values)
        exact = _corrected(values, self.corrections, sign)
        change = self.change.to(values.device)
        at = torch.unravel_index(self.index.long().to(values.device), values.shape)
        wide = torch.promote_types(values.dtype, change.dtype)
        values[at] = (values[at].to(wide) + sign * change).to(values.dtype)
        _correct(values, exact)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change `scale * up @ down` of all outputs of a linear map, or of some rows of a fused one; of a stack of E experts' matrices
    with a pair of factors for each, up [E, O, R] and down [E, R, I]."""

    up_OR: Tensor
    down_RI: Tensor
    scale: float
    shape: torch.Size
    """Of the parameter as it is stored."""
    start: int | None = None
    """First output of this change; None: all."""
    stop: int | None = None
    transposed: bool = False
    """The parameter is stored [I, O], or [E, I, O]."""

    def product(self, device: torch.device) -> Tensor:
        """The change of its own outputs, [O, I] or [E, O, I], computed on a device."""
        return self.scale * self.up_OR.to(device) @ self.down_RI.to(device)

    def spread(self) -> Tensor:
        """The change of every entry, in the layout of the stored parameter."""
        product_OI = self.product(self.up_OR.device)
        spread = product_OI.new_zeros(self.shape)
        self._outputs(spread).copy_(product_OI)
        return spread

    def times(self, factor: Factor) -> LowRank:
        """The change scaled: its scale by a number, its outputs by one number each."""
        if isinstance(factor, Tensor):
            return replace(self, up_OR=self.up_OR * factor.reshape(-1)[self.start : self.stop, None])
        return replace(self, scale=self.scale * factor)

    def add_to(self, values: Tensor, sign: int) -> None:
        """Add (1) or subtract (-1) the change in place, computed in the wider of the two types."""
        outputs = self._outputs(values)
        product_OI = self.product(values.device)
        outputs.copy_(outputs.to(torch.promote_types(values.dtype, product_OI.dtype)) + sign * product_OI)

    def _outputs(self, values: Tensor) -> Tensor:
        return (values.mT if self.transposed else values)[self.start : self.stop]


Form: TypeAlias = "Dense | Sparse | LowRank"


def bits(values: Tensor) -> Tensor:
    """The numbers as integers, so that comparing them tells -0.0 from 0.0 and finds equal NaNs."""
    return values.contiguous().view(_BITS[values.element_size()])


def difference(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Dense | Sparse | None:
    """What makes `tuned` of `base`, exactly; None where they are equal bit for bit.

    Args:
        base: the numbers before.
        tuned: the numbers after, in the same type and shape.
        dtype: of the stored difference. The result is exact in any; one narrower than the weights needs more
            corrections.

    Returns:
        A sparse change where fewer than half of the entries changed, else a dense one.
    """
    changed = bits(base) != bits(tuned)
    count = int(changed.count_nonzero())
    if not count:
        return None
    if 2 * count >= changed.numel():
        change = _difference(base, tuned, dtype)
        wrong = _rounds_wrong(base, tuned, change).reshape(-1).nonzero()[:, 0]
        return Dense(change.cpu(), _corrections(wrong, wrong, base.reshape(-1), tuned.reshape(-1)))
    index = changed.reshape(-1).nonzero()[:, 0]
    before, after = base.reshape(-1)[index], tuned.reshape(-1)[index]
    change = _difference(before, after, dtype)
    wrong = _rounds_wrong(before, after, change).nonzero()[:, 0]
    corrections = _corrections(index[wrong], wrong, before, after)
    return Sparse(_narrow(index, base.numel()), change.cpu(), base.shape, corrections)


def compress(change: Tensor) -> Dense | Sparse:
    """A change in the form that takes less room; one of zeros alone is sparse and empty."""
    index = change.reshape(-1).nonzero()[:, 0]
    if 2 * len(index) >= change.numel():
        return Dense(change)
    return Sparse(_narrow(index, change.numel()), change.reshape(-1)[index], change.shape)


def combine(forms: Iterable[Form]) -> tuple[Form, ...]:
    """The sum of changes of one parameter in few forms: entries are added, low ranks stand side by side."""
    entries: list[Dense | Sparse] = []
    low: dict[tuple[int | None, int | None, bool], list[LowRank]] = {}
    for form in forms:
        if isinstance(form, LowRank):
            low.setdefault((form.start, form.stop, form.transposed), []).append(form)
        else:
            entries.append(form)
    if len(entries) > 1:
        entries = [compress(sum((form.spread() for form in entries[1:]), entries[0].spread()))]
    return (*entries, *(_beside(group) for group in low.values()))


def _beside(group: list[LowRank]) -> LowRank:
    """One low-rank change for several: a sum of products is the product of the factors side by side, not of sums."""
    if len(group) == 1:
        return group[0]
    up_OR = torch.cat([form.scale * form.up_OR for form in group], dim=-1)
    return replace(group[0], up_OR=up_OR, down_RI=torch.cat([form.down_RI for form in group], dim=-2), scale=1.0)


def _difference(base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(base.dtype, dtype)
    return (tuned.to(wide) - base.to(wide)).to(dtype)


def _rounds_wrong(base: Tensor, tuned: Tensor, change: Tensor) -> Tensor:
    """Where `base + change` is not `tuned` or `tuned - change` not `base`, as `add_to` computes them."""
    wide = torch.promote_types(base.dtype, change.dtype)
    forth = (base.to(wide) + change).to(base.dtype)
    back = (tuned.to(wide) - change).to(base.dtype)
    return (bits(forth) != bits(tuned)) | (bits(back) != bits(base))


def _corrections(index: Tensor, at: Tensor, base: Tensor, tuned: Tensor) -> Corrections | None:
    if not len(index):
        return None
    return Corrections(index.cpu(), base[at].cpu(), tuned[at].cpu())


def _narrow(index: Tensor, numel: int) -> Tensor:
    """Four bytes an index where they do: then fewer than half of the entries take less room than all of them."""
    return index.to("cpu", torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64)


def _corrected(values: Tensor, corrections: Corrections | None, sign: int) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Where exact numbers are to be written, and which: only where the weights hold what the correction expects."""
    if corrections is None or corrections.before.dtype != values.dtype:
        return None
    now, then = (corrections.before, corrections.after)[::sign]
    index = corrections.index.long()
    at = torch.unravel_index(index.to(values.device), values.shape)
    known = bits(values[at]) == bits(now.to(values.device))
    return tuple(axis[known] for axis in at), then.to(values.device)[known]


def _correct(values: Tensor, exact: tuple[tuple[Tensor, ...], Tensor] | None) -> None:
    if exact is not None:
        at, then = exact
        values[at] = then
