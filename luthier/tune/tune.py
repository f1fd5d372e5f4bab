"""The owner of everything that trains: attaches techniques to a model, finds their gradients, swaps back to the base, merges.

The order is load, shard, attach. Live weights are looked up by place and never held, so that a model may be sharded, moved or
compiled in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from luthier.kinds import Additive, Freezing, HiddenEdit, Now, Place, Prefix, Prompt, Seen, Selective, Services, State, Tensors
from luthier.kinds.parts import Parts
from luthier.models.attention import Context
from luthier.models.block_outputs import open_blocks
from luthier.models.quantized import QuantizedLinear
from luthier.models.sharding import Root, put
from luthier.tune import attach, base, change, merge
from luthier.tune.sites import Own, Site
from luthier.tune.trained import Trained, region, watch, write

Result = TypeVar("Result")


def _nothing(*told: Any) -> None:
    """Where nobody listens."""


class Tune:
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
        self.additives: list[tuple[str, Additive, State]] = []
        self.edits: list[tuple[str, HiddenEdit, State]] = []
        self.freezings: list[tuple[str, Freezing, State]] = []
        self.prompt_length = 0
        self.prompt_labels: Tensor | None = None
        """Targets of a prompt's virtual tokens, where they are learnt."""
        self.packs = False
        """Rows of a micro-batch run without padding."""
        self.is_off = False
        self.untouched = True
        """No trained number was written yet: what trains in place still is the base."""
        self.altered: dict[str, Tensor] = {}
        """Base values of whole parameters, by name, where the base is kept and the trained numbers do not tell it: a start
        changed them, or numbers that leave keep what they learnt."""
        self.merged: dict[str, Tensor] | None = None
        """Values before merging, by parameter name."""
        self.expanded: dict[str, QuantizedLinear] = {}
        """While merged, the quantized linear maps that dense ones stand for, by module."""
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        self.observing: frozenset[tuple[str, Place]] = frozenset()
        self.dense: dict[tuple[str, Place], Tensor] = {}
        self.arrived: Callable[[Trained], None] = _nothing
        """Called when a micro-batch's gradient of a tensor is complete."""
        self.moved: Callable[[Trained, Tensor, int], None] = _nothing
        """Called when the entries of a tensor were rearranged: its optimizer state must follow."""
        self.renewed: Callable[[Trained], None] = _nothing
        """Called when a tensor is new, or all its entries are: its optimizer state begins anew."""
        self.left: Callable[[Trained], None] = _nothing
        """Called when a tensor is gone or needs no optimizer state for now."""
        self.seeded: Callable[[Trained, Tensor, Seen], None] = _nothing
        """Called when something is known of the gradients of new entries."""
        self.attention_handle: Any = None
        self._block_handles: list[Any] = []
        self._handles: dict[str, Any] = {}
        model.requires_grad_(False)

    def add(self, slot: str, value: object, services: Services, state: State) -> None:
        """Attach one value of a technique under its slot (`half`, `2.lora` ...).

        Raises:
            LuthierError: it finds no place, selects nothing, or trains a number that another technique trains.
        """
        if isinstance(value, Selective):
            attach.add_selective(self, slot, value, services, state)
        elif isinstance(value, Additive):
            attach.add_additive(self, slot, value, services, state)
        elif isinstance(value, HiddenEdit):
            attach.add_edit(self, slot, value, services, state)
        elif isinstance(value, Prompt):
            attach.add_prompt(self, slot, value, services)
        elif isinstance(value, Prefix):
            attach.add_prefix(self, slot, value, services)
        else:
            raise TypeError(f"a {type(value).__name__} frees no numbers")

    def add_free(self, slot: str, tensors: Tensors, rate: float = 1.0) -> Own:
        """Trained tensors that stand beside the model: those of an objective."""
        return attach.own(self, Own(slot, None), tensors, form="free", rates=dict.fromkeys(tensors, rate))

    def site(self, module: str) -> Site:
        """What stands at a module; made and hooked when first asked for."""
        if module not in self.sites:
            self.sites[module] = Site(self.model.get_submodule(module), lambda: self.is_off or self.merged is not None)
            self.sites[module].attach()
        return self.sites[module]

    def touches(self, module: str) -> bool:
        """Whether anything stands at a module."""
        return module in self.sites

    def region(self, place: Place) -> Tensor:
        """The live values at a place: a view, [O, I] for linear maps however they are stored; of a quantized weight a copy."""
        return region(self.model, place, self.parts.transposed)

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
            write(self.region(trained.place), trained.form, trained.index, trained.master.detach())

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

    def at(self, which: str) -> AbstractContextManager[None]:
        """Run the model as it was: `base`, or a snapshot's name. The tuned model comes back afterwards, bit for bit."""
        return base.at_base(self) if which == "base" else base.at_snapshot(self, which)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Leave out what stands beside the weights; the weights themselves are as they are."""
        was_off, self.is_off = self.is_off, True
        try:
            yield
        finally:
            self.is_off = was_off

    def off(self) -> AbstractContextManager[None]:
        """The base: `at("base")`."""
        return self.at("base")

    def snapshot(self, name: str, share: float = 1.0) -> None:
        """Remember all trained numbers as they are now, for `at(name)` and `go_back(name)`; with a `share` below 1, move what is
        remembered that share of the way.

        Raises:
            LuthierError: an average of numbers that come and go.
        """
        now = change.capture(self)
        self.snapshots[name] = now if share == 1.0 else change.average(self, self.snapshots.get(name, now), now, share)

    def go_back(self, name: str) -> None:
        """Make a snapshot's numbers the trained ones again. Optimizer state stays as it is."""
        change.put_back(self, self.snapshots[name])

    def set(self, values: dict[str, Tensor]) -> None:
        """Give trained tensors new values, by name, and the live weights with them."""
        for key, value in values.items():
            put(self.trained[key].master.data, value)
            self.push(self.trained[key])

    def freeze(self, now: Now) -> None:
        """Decide what stands still in this step."""
        change.freeze(self, now)

    def start_observing(self, now: Now) -> None:
        """Decide which techniques look at dense gradients in this step."""
        change.start_observing(self, now)

    def observe_nothing(self) -> None:
        """Take part in the sums of observed gradients without rows of one's own."""
        change.observe_nothing(self)

    def observe(self, total: Callable[[Tensor], Tensor]) -> None:
        """Hand every observer its dense gradient of the step, once, summed over processes by `total`."""
        change.observe(self, total)

    def refresh(self, services_of: Callable[[str], Services]) -> list[str]:
        """Let techniques change what trains. Returns one sentence for each change."""
        return change.refresh(self, services_of)

    def merge(self) -> None:
        """Fold what stands beside the weights into them; `unmerge` takes it out again, bit for bit."""
        merge.merge(self)

    def unmerge(self) -> None:
        """Undo `merge`."""
        merge.unmerge(self)

    def rest(self) -> None:
        """Training is over: let go of what only steps need. Gradients stay at the model from now on, as torch puts them there."""
        self.free_gradients()
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.arrived = self.moved = self.renewed = self.left = self.seeded = _nothing
        self.snapshots.clear()

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
        self.model.requires_grad_(False)

    def numbers(self) -> int:
        """How many numbers train."""
        return sum(one.numel for one in self.trained.values())

    def free_gradients(self) -> None:
        """Forget gradients of an unfinished step."""
        for trained in self.trained.values():
            trained.gradient = None
        self.dense.clear()
