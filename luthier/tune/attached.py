"""What is attached to a model: the numbers that train, where they stand, and how they are reached. What is done with it is in the files
beside this one, and `luthier.tune.tune` puts them together.

The order is load, shard, attach. Live weights are looked up by place and never held, so that a model may be sharded, moved or
compiled in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from luthier.kinds import Freezing, Head, Place, Prefix, RepresentationEdit, Seen, Selective, State, WeightDelta
from luthier.kinds.parts import Parts
from luthier.models.attention import Context
from luthier.models.block_outputs import open_blocks
from luthier.models.quantized import QuantizedLinear
from luthier.models.sharding import Root, put
from luthier.tune import saving
from luthier.tune.sites import Addition, Own, Site
from luthier.tune.trained import Trained, region, region_of, watch, write
from luthier.tune.turns import Turns

Result = TypeVar("Result")


def nothing(*told: Any) -> None:
    """Where nobody listens."""


class Attached:
    """Which numbers of a model train, and how they are reached.

    Args:
        model: a loaded model; everything in it is frozen here.
        parts: its map.
        masters: `fp32` keeps fp32 copies of trained numbers the model holds in a narrower type; `none` lets the live values be their
            own master, written back with stochastic rounding.
        keep_base: keep the base's values of numbers that train in place, so that `at("base")` works. What stands beside the
            weights needs no copy.
        root: stands above a model that is spread over processes.
    """

    def __init__(
        self, model: nn.Module, parts: Parts, *, masters: str = "fp32", keep_base: bool = False, root: Root | None = None
    ) -> None:
        self.model, self.parts, self.masters, self.keep_base, self.root = model, parts, masters, keep_base, root
        self.trained: dict[str, Trained] = {}
        self.sites: dict[str, Site] = {}
        self.prefixes: list[tuple[Own, Prefix]] = []
        self.owns: list[Own] = []
        self.selectives: list[tuple[str, Selective, State]] = []
        self.weight_deltas: list[tuple[str, WeightDelta, State]] = []
        self.edits: list[tuple[str, RepresentationEdit, State]] = []
        self.freezings: list[tuple[str, Freezing, State]] = []
        self.head: tuple[Own, Head] | None = None
        """What reads whole rows, with its tensors."""
        self.others: dict[str, Attached] = {}
        """The run's other models, by name, which never train. What stands beside this one's weights acts only while it is run."""
        self.beneath: Attached | None = None
        """Of another model of a run: whose weights it stands beside, if it has none of its own."""
        self.turns = Turns()
        """Whose turn it is to move, and each technique's clock."""
        self.prompt_length = 0
        self.prompt_labels: Tensor | None = None
        """Labels of a prompt's virtual tokens, where they are learned."""
        self.drawing: Tensor | None = None
        """While the run trains: keys for the draws of each token of the pass. They stay until the backward pass is done, which may run
        parts of the model again."""
        self.packs = False
        """Rows of a micro-batch run without padding."""
        self.is_off = False
        self.only_shapes = False
        """Passes compute shapes and no numbers, so that none may be put into the place of others."""
        self.untouched = True
        """No trained number was written yet: what trains in place still is the base."""
        self.altered: dict[str, Tensor] = {}
        """Base values of whole parameters, by name, where the base is kept and the trained numbers do not tell it: a start
        changed them, or numbers that leave keep what they learned."""
        self.merged: dict[str, Tensor] | None = None
        """Values before merging, by parameter name."""
        self.expanded: dict[str, QuantizedLinear] = {}
        """While merged, the quantized linear maps that dense ones stand for, by module."""
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        self.observing: frozenset[tuple[str, Place]] = frozenset()
        self.dense: dict[tuple[str, Place], Tensor] = {}
        self.arrived: Callable[[Trained], None] = nothing
        """Called when a micro-batch's gradient of a tensor is complete."""
        self.moved: Callable[[Trained, Tensor, int], None] = nothing
        """Called when the entries of a tensor were rearranged: its optimizer state must follow."""
        self.renewed: Callable[[Trained], None] = nothing
        """Called when a tensor is new, or all its entries are: its optimizer state begins anew."""
        self.left: Callable[[Trained], None] = nothing
        """Called when a tensor is gone or needs no optimizer state for now."""
        self.seeded: Callable[[Trained, Tensor, Seen], None] = nothing
        """Called when something is known of the gradients of new entries."""
        self.attention_handle: Any = None
        self._block_handles: list[Any] = []
        self._handles: dict[str, Any] = {}
        model.requires_grad_(False)

    @property
    def draws(self) -> bool:
        """Whether anything drops numbers while the run trains, in each row other ones."""
        return any(value.draws for _, value, _ in self.weight_deltas) or any(value.draws for _, value, _ in self.edits)

    def site(self, module: str) -> Site:
        """What stands at a module; made and hooked when first asked for."""
        if module not in self.sites:
            here = self.model.get_submodule(module)
            self.sites[module] = Site(here, lambda: self.is_off or self.merged is not None, lambda: self.drawing)
            self.sites[module].attach()
            saving.guard(self)
        return self.sites[module]

    def touches(self, module: str) -> bool:
        """Whether anything stands at a module."""
        return module in self.sites

    def region(self, place: Place) -> Tensor:
        """The live values at a place: a view, [O, I] for linear maps however they are stored; of a quantized weight a copy."""
        return region(self.model, place, self.parts.transposed)

    def held(self, place: Place) -> Tensor:
        """The values at a place without a graph, [O, I] for linear maps: the live ones, or where optimizers hold some of them in a wider
        type a copy in that."""
        if any(one.master.dtype != self.model.get_parameter(place.parameter).dtype for one in self._in_place(place.parameter)):
            return region_of(self.widened(place.parameter), place, self.parts.transposed)
        return self.region(place)

    def widened(self, parameter: str) -> Tensor:
        """A copy of a whole parameter's values as the model stores them, in fp32 or wider, those that train as optimizers hold them."""
        live = self.model.get_parameter(parameter).data
        values = live.to(torch.promote_types(live.dtype, torch.float32), copy=True)
        for one in self._in_place(parameter):
            if one.form == "whole":
                values.copy_(one.master)
            elif one.place is not None:
                write(region_of(values, one.place, self.parts.transposed), one.form, one.index, one.master.detach())
        return values

    def _in_place(self, parameter: str) -> list[Trained]:
        """What trains of a parameter's own numbers."""
        return [
            one
            for one in self.trained.values()
            if one.place is not None and one.place.parameter == parameter and one.form not in ("factor", "free")
        ]

    def register(self, trained: Trained) -> None:
        """Take a tensor into the run and watch for its gradients."""
        if trained.name in self._handles:
            self._handles[trained.name].remove()
        self.trained[trained.name] = trained
        here = weakref.ref(self)

        def arrived(one: Trained) -> None:
            tune = here()
            if tune is not None:
                tune.arrived(one)

        self._handles[trained.name] = watch(trained, arrived)

    def forget(self, trained: Trained) -> None:
        """Take a tensor out of the run."""
        self._handles.pop(trained.name).remove()
        del self.trained[trained.name]
        self.left(trained)

    def push(self, trained: Trained) -> None:
        """Write a master to the live weight. Every change of a master goes through here."""
        self.untouched = False
        if trained.place is None or trained.form in ("factor", "free"):
            return
        if trained.is_live:
            return
        if trained.form == "whole":
            # In the stored layout, not the logical one.
            trained.leaf.data.copy_(trained.master)
        else:
            write(self.region(trained.place), trained.form, trained.index, trained.master)

    def run(self, do: Callable[[], Result]) -> Result:
        """Call what makes forward passes, with the model gathered where it is spread over processes."""
        return do() if self.root is None else self.root.run(do)

    def context(self) -> Context:
        """What attention must know in this forward pass: prefixes, unless the base is asked for."""
        if self.is_off or not self.prefixes:
            return Context()
        dtype = next(self.model.parameters()).dtype
        return Context(tuple((own.tensors(dtype), prefix.keyvalue) for own, prefix in self.prefixes))

    def open_blocks(self) -> None:
        """Let forward passes change what blocks give; done when first asked for, behind whatever stands at the blocks."""
        if not self._block_handles:
            self._block_handles = open_blocks(self.model, self.parts)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Leave out what stands beside the weights; the weights themselves are as they are."""
        was_off, self.is_off = self.is_off, True
        try:
            yield
        finally:
            self.is_off = was_off

    @contextmanager
    def drawing_at(self, key_N: Tensor | None) -> Iterator[None]:
        """Let what stands beside the weights draw for these tokens; with None, not at all."""
        before, self.drawing = self.drawing, key_N
        try:
            yield
        finally:
            self.drawing = before

    def set(self, values: dict[str, Tensor]) -> None:
        """Give trained tensors new values, by name, and the live weights with them."""
        for key, value in values.items():
            put(self.trained[key].master.data, value)
            self.push(self.trained[key])

    def detach(self) -> None:
        """Take every hook off the model. In-place changes stay."""
        for site in self.sites.values():
            site.detach()
        for handle in (*self._handles.values(), *self._block_handles):
            handle.remove()
        self.sites.clear()
        self._handles.clear()
        self._block_handles.clear()
        if self.attention_handle is not None:
            self.attention_handle.remove()
            self.attention_handle = None
        saving.unguard(self)
        self.model.requires_grad_(False)

    @property
    def additions(self) -> list[Addition]:
        """Everything that is added to weights."""
        return [one for site in self.sites.values() for one in site.additions]

    @property
    def room_for_experts(self) -> int:
        """Bytes for the experts of the widest block with the deltas in their matrices, which are there while that block runs; 0 where no
        delta stands at experts."""
        return max((site.stand_ins.room for site in self.sites.values() if site.stand_ins is not None), default=0)

    def numbers(self) -> int:
        """How many numbers train."""
        return sum(one.numel for one in self.trained.values())

    def free_gradients(self) -> None:
        """Forget gradients of an unfinished step."""
        for trained in self.trained.values():
            trained.gradient = None
        self.dense.clear()
