"""The owner of everything that trains: attaches techniques to a model, finds their gradients, swaps back to the base, merges."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from luthier.kinds import Head, Now, Prefix, Prompt, RepresentationEdit, Selective, Services, State, Tensors, WeightDelta
from luthier.tune import attach, base, change, merge
from luthier.tune.attached import Attached, nothing
from luthier.tune.sites import HEAD, Own


class Tune(Attached):
    """Which numbers of a model train, how they are reached, and what is done with them: `Attached` holds, these methods do."""

    def add(self, slot: str, value: object, services: Services, state: State) -> None:
        """Attach one value of a technique under its slot (`half`, `2.lora` ...).

        Raises:
            LuthierError: it finds no place, selects nothing, or trains a number that another technique trains.
        """
        if isinstance(value, Selective):
            attach.add_selective(self, slot, value, services, state)
        elif isinstance(value, WeightDelta):
            attach.add_weight_delta(self, slot, value, services, state)
        elif isinstance(value, RepresentationEdit):
            attach.add_edit(self, slot, value, services, state)
        elif isinstance(value, Prompt):
            attach.add_prompt(self, slot, value, services)
        elif isinstance(value, Prefix):
            attach.add_prefix(self, slot, value, services)
        else:
            raise TypeError(f"a {type(value).__name__} frees no numbers")

    def add_new_rows(self, state: State) -> None:
        """Free the rows of tokens that were added for this run, where nothing that was attached before trains them.

        Raises:
            LuthierError: something that was attached before trains a part of them.
        """
        attach.add_new_rows(self, state)

    def add_free(self, slot: str, tensors: Tensors, rate: float = 1.0) -> Own:
        """Trained tensors that stand beside the model: those of an objective."""
        return attach.own(self, Own(slot, None), tensors, form="free", rates=dict.fromkeys(tensors, rate))

    def add_head(self, slot: str, head: Head, tensors: Tensors) -> None:
        """What reads rows beside the model, with its trained tensors."""
        mine = Own(slot, None, part=HEAD)
        self.head = (attach.own(self, mine, tensors, form="free", rates=dict.fromkeys(tensors, head.rate)), head)

    def at(self, which: str) -> AbstractContextManager[None]:
        """Run the model as it was: `base`, or a snapshot's name. The tuned model comes back afterwards, bit for bit."""
        return base.at_base(self) if which == "base" else base.at_snapshot(self, which)

    def running(self, name: str) -> AbstractContextManager[Attached]:
        """Another model of the run, by its name under `models:`, as it is run."""
        return base.running(self, name)

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

    def freeze(self, now: Now) -> None:
        """Decide what stands still in this step."""
        change.freeze(self, now)

    def moves_at(self, now: Now) -> bool:
        """Whether anything trains in a step, as far as it can be known beforehand."""
        return change.moves_at(self, now)

    def start_observing(self, now: Now) -> None:
        """Decide which techniques look at dense gradients in this step."""
        change.start_observing(self, now)

    def observe_nothing(self) -> None:
        """Take part in the sums of observed gradients without rows of one's own."""
        change.observe_nothing(self)

    def observed(self) -> list[str]:
        """Names of what trains at the places that are observed in this step."""
        return change.observed(self)

    def observe(
        self,
        total: Callable[[Tensor], Tensor],
        received: Mapping[str, Tensor],
        factor: Callable[[Collection[str]], float],
    ) -> None:
        """Hand every observer its dense gradient of the step, once, summed over processes by `total`, as optimizers received it: see
        `luthier.tune.change.observe`."""
        change.observe(self, total, received, factor)

    def refresh(self, services_of: Callable[[str], Services], now: Now) -> list[str]:
        """Let techniques change what trains behind a step. Returns one sentence for each change."""
        return change.refresh(self, services_of, now)

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
        self.arrived = self.moved = self.renewed = self.left = self.seeded = nothing
        self.snapshots.clear()
