"""Deltas: what a run changed, as a thing that can be applied, removed, added, scaled, masked and saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier import machine
from luthier.delta import beside, storage
from luthier.delta.forms import Factor, Form, combine, compress, difference
from luthier.delta.sources import Source, fits, in_words, live, ties, untie, weights_of
from luthier.delta.storage import Base
from luthier.errors import LuthierError, nearest
from luthier.kinds import Place
from luthier.kinds.parts import Parts
from luthier.models.fingerprint import fingerprint as fingerprint_of
from luthier.models.quantized import quantized, refuse_change

if TYPE_CHECKING:
    from luthier.tune import Tune


@dataclass(frozen=True, eq=False)
class Delta:
    """What changed between a base and a tuned model: an immutable mapping from parameter names to changes.

    The change of a parameter is a sum of forms (`Dense`, `Sparse`, `LowRank`), on the CPU. Tied parameters appear once,
    under their first name; a further name appears only where its tensor is no longer tied, and `apply` then unties it.

    `apply` gives the tuned model bit for bit, and `remove` the base, where the delta holds dense and sparse changes
    made by `between` or `of`: they are differences in fp32 (wider for wider weights), and the entries where a
    difference rounds to another number are kept beside it with both values. Low-rank changes are exact up to the
    rounding of the sum. Adding and scaling work on the differences.
    """

    changes: Mapping[str, tuple[Form, ...]]
    base: Base = field(default_factory=Base)

    def __post_init__(self) -> None:
        object.__setattr__(self, "changes", MappingProxyType(dict(self.changes)))

    @classmethod
    def between(
        cls,
        base: Source,
        tuned: Source,
        *,
        name: str = "",
        fingerprint: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Delta:
        """The delta that makes `tuned` of `base`, tensor by tensor.

        Args:
            base: a model, its tensors by name, or safetensors files (a file or a folder).
            tuned: likewise.
            name: of the base, for messages.
            fingerprint: of the base; None: computed where the base is a model, else unknown.
            dtype: of stored differences; None: fp32, or wider where the weights are. Exact in any type; bfloat16 halves
                the file for weights in bfloat16.

        Raises:
            LuthierError: the two do not have the same tensors, or the tuned numbers do not fit the base's type.
        """
        before, after = weights_of(base), weights_of(tuned)
        names = list(dict.fromkeys([*before.distinct, *after.distinct]))
        lacking = [one for one in names if one not in before.read or one not in after.read]
        if lacking:
            which = "base" if lacking[0] not in before.read else "tuned model"
            raise LuthierError(
                f"the {which} lacks {len(lacking)} of {len(names)} tensors",
                where=lacking[0],
                fix="compare two states of the same model",
            )
        changes: dict[str, tuple[Form, ...]] = {}
        dtypes: set[torch.dtype] = set()
        for one in names:
            old = before.read[one]()
            dtypes.add(old.dtype)
            new = fits(old, after.read[one](), one)
            wide = dtype or torch.promote_types(old.dtype, torch.float32)
            form: Form | None = difference(old, new, wide)
            if form is None and one in after.distinct and one not in before.distinct:
                # Nothing changed, but the base ties this tensor to one that may have.
                form = compress(torch.zeros(old.shape, dtype=wide))
            if form is not None:
                changes[one] = (form,)
        if fingerprint is None:
            fingerprint = fingerprint_of(base) if isinstance(base, nn.Module) else ""
        return cls(changes, Base(name, fingerprint, in_words(dtypes)))

    @classmethod
    def of(cls, tune: Tune, base: Source | None = None, *, name: str = "", fingerprint: str | None = None) -> Delta:
        """The delta of a run: numbers that trained in place against the base, deltas beside the weights as they are.

        Low-rank techniques stay low-rank, others become dense. What is no change of a weight (prompts, prefixes, edits
        of hidden states) is not part of a delta.

        Args:
            tune: what trained, not merged.
            base: the base as for `between`; None: what the tune kept of it (`keep_base=True`), which deltas that stand
                beside untouched weights need not.
            name: of the base, for messages.
            fingerprint: of the base; None: computed.

        Raises:
            LuthierError: the tune is merged, or the base is neither given nor kept.
        """
        if tune.merged is not None:
            raise LuthierError("the model is merged", where="Delta.of", fix="call unmerge() first")
        if base is None:
            kept = beside.kept_base(tune, fingerprint)
            inside = cls.between(kept.base, kept.tuned, name=name, fingerprint=kept.fingerprint)
        else:
            inside = cls.between(base, tune.model, name=name, fingerprint=fingerprint)
        changes = dict(inside.changes)
        for one, forms in beside.forms_beside(tune).items():
            # What changed a tied tensor changed it under every name.
            changes[one] = (*inside.changes.get(beside.first_name(tune, one), ()), *forms)
        codes = {f"{module}.{tensor}" for module in quantized(tune.model) for tensor in ("codes", "scales")}
        types = in_words(one.dtype for name, one in live(tune.model).items() if name not in codes)
        return cls(changes, inside.base._replace(dtype=types))

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """A delta from the file `save` wrote.

        Raises:
            LuthierError: there is no such file, it holds no delta, or it is damaged.
        """
        return cls(*storage.load(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that names its base.

        Raises:
            LuthierError: the file cannot be written.
        """
        storage.save(Path(path), self.changes, self.base)

    def __getitem__(self, name: str) -> tuple[Form, ...]:
        return self.changes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def spread(self, name: str) -> Tensor:
        """The whole change of a parameter, entry by entry, as the parameter is stored."""
        first, *others = (form.spread() for form in self.changes[name])
        return sum(others, first)

    def norm(self) -> float:
        """The Euclidean norm over all changes."""
        return math.sqrt(sum(float(machine.widened(self.spread(name)).square().sum()) for name in self))

    def apply(self, model: nn.Module, *, force: bool = False) -> None:
        """Make the tuned model of the base, in place.

        Where the delta does not know its base's fingerprint, only names and shapes are compared.

        Args:
            model: the base. A map of its parts made before is out of date if a tie is cut.
            force: also for another base, where the names and shapes fit.

        Raises:
            LuthierError: the model is another than the delta's base; nothing was changed.
        """
        if not force:
            self._check_base(model)
        self._check_writable(model)
        for name in ties(model):
            if name in self.changes:
                untie(model, name)
        self._add_to(model, 1)

    def remove(self, model: nn.Module) -> None:
        """Make the base of the tuned model, in place; a cut tie stays cut.

        Raises:
            LuthierError: the model lacks a changed parameter or has it in another shape; nothing was changed.
        """
        self._check_writable(model)
        self._add_to(model, -1)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[None]:
        """The tuned model without the delta inside the block; afterwards it is the tuned one again, bit for bit.

        Raises:
            LuthierError: as `remove`.
        """
        self._check_writable(model)
        weights = live(model)
        tuned = {name: weights[name].clone() for name in self}
        self._add_to(model, -1)
        try:
            yield
        finally:
            for name, values in tuned.items():
                weights[name].copy_(values)

    def restore(self, tune: Tune, *, force: bool = False) -> None:
        """Put the delta into a tune to which the techniques that made it were attached, and nothing trained yet.

        What stood beside the weights stands there again, the rest goes into the weights.

        Args:
            tune: on the base, which `at("base")` still runs afterwards. Techniques whose start changes the base need
                `keep_base=True`.
            force: also for another base, where the names and shapes fit.

        Raises:
            LuthierError: another base, or a change that no attached technique takes; nothing was changed.
        """
        beside.changed_by_starts(tune)
        with tune.at("base"):
            if not force:
                self._check_base(tune.model)
            self._check_shapes(tune.model)
        beside.restore(tune, self.changes)

    def __add__(self, other: Delta) -> Delta:
        """Both changes. Low ranks stand side by side, so their product is the sum of the products.

        Raises:
            LuthierError: the deltas belong to different bases, or their shapes differ.
        """
        if self.base.fingerprint and other.base.fingerprint and self.base.fingerprint != other.base.fingerprint:
            raise LuthierError(
                f"these deltas belong to different bases: {self.base} and {other.base}",
                where="Delta",
                fix="add deltas of one base",
            )
        forms = {name: (*self.changes.get(name, ()), *other.changes.get(name, ())) for name in [*self, *other]}
        for name, summed in forms.items():
            if len({form.shape for form in summed}) > 1:
                raise LuthierError("these deltas have other shapes", where=name, fix="add deltas of one base")
        base = self.base if self.base.fingerprint else other.base
        return Delta({name: combine(summed) for name, summed in forms.items()}, base)

    def __mul__(self, factor: float) -> Delta:
        """The change scaled."""
        return self._times(lambda name: factor)

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return self * -1.0

    def __sub__(self, other: Delta) -> Delta:
        """This change without another one; errors as for `+`."""
        return self + -other

    def scaled(self, factor: Callable[[Place], float], parts: Parts) -> Delta:
        """The change scaled place by place, as by layer and role.

        Args:
            factor: for each place that changed, also each part of a fused parameter.
            parts: the model's map.

        Raises:
            LuthierError: a changed parameter is not in the map.
        """
        return self._times(lambda name: _factor(places_of(name, parts), factor, self.changes[name][0].shape, parts))

    def masked(self, keep: Callable[[str, Tensor], Tensor]) -> Delta:
        """The change of some entries only.

        Args:
            keep: gets a parameter's name and its whole change, returns a boolean tensor of that shape: which entries
                stay.
        """
        kept = {name: compress(torch.where(keep(name, change := self.spread(name)), change, 0.0)) for name in self}
        return replace(self, changes={name: (form,) for name, form in kept.items()})

    def _times(self, factor: Callable[[str], Factor]) -> Delta:
        changes: dict[str, tuple[Form, ...]] = {}
        for name, forms in self.changes.items():
            by = factor(name)
            # Unscaled, a change keeps its corrections.
            same = not isinstance(by, Tensor) and by == 1.0
            changes[name] = forms if same else tuple(form.times(by) for form in forms)
        return replace(self, changes=changes)

    def _add_to(self, model: nn.Module, sign: int) -> None:
        weights = live(model)
        for name, forms in self.changes.items():
            for form in forms[::sign]:
                form.add_to(weights[name], sign)

    def _check_base(self, model: nn.Module) -> None:
        known = self.base.fingerprint
        found = fingerprint_of(model) if known else ""
        if known != found:
            raise LuthierError(
                f"this delta belongs to {self.base}, and the model is another ({found[:12]})",
                where="Delta",
                fix=f"load {self.base.name or 'the base'} in {self.base.dtype or 'its type'}, or force it knowingly",
            )

    def _check_writable(self, model: nn.Module) -> None:
        self._check_shapes(model)
        refuse_change(
            model, self, "the delta changes the model's own weights", "restore it into a tune, where it stands beside them"
        )

    def _check_shapes(self, model: nn.Module) -> None:
        shapes = {name: values.shape for name, values in live(model).items()}
        shapes |= {f"{module}.weight": linear.shape for module, linear in quantized(model).items()}
        for name, forms in self.changes.items():
            if name not in shapes:
                fix = nearest(name, shapes) or "use the architecture the delta was made with"
                raise LuthierError("the model lacks a parameter that the delta changes", where=name, fix=fix)
            if any(form.shape != shapes[name] for form in forms):
                raise LuthierError(
                    f"the model has shape {tuple(shapes[name])} where the delta has {tuple(forms[0].shape)}",
                    where=name,
                    fix="use the base the delta was made with",
                )


def places_of(name: str, parts: Parts) -> list[Place]:
    """The places of a parameter: several where it is fused; a tied one under a further name has its own.

    Raises:
        LuthierError: the map does not know the parameter.
    """
    places = [place for place in parts.places if place.parameter == name]
    if places:
        return places
    module, _, tensor = name.rpartition(".")
    if module in parts.ties and module == parts.head:
        return [Place(module, tensor, "head", None)]
    raise LuthierError(
        "this parameter is not in the model's map",
        where=name,
        fix=nearest(name, {place.parameter for place in parts.places}) or "use the map of the delta's base",
    )


def _factor(places: list[Place], factor: Callable[[Place], float], shape: torch.Size, parts: Parts) -> Factor:
    """One factor for a parameter, or one for each of its outputs where they differ."""
    factors = [factor(place) for place in places]
    if len(set(factors)) == 1:
        return factors[0]
    transposed = places[0].module in parts.transposed and len(shape) == 2
    by_output = torch.ones(shape[-1] if transposed else shape[0])
    for place, one in zip(places, factors, strict=True):
        by_output[place.start : place.stop] = one
    return by_output if transposed else by_output.reshape(-1, *[1] * (len(shape) - 1))
