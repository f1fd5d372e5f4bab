"""The step as one ordered chain of transforms and optimizers: before the optimizer they see gradients, behind it updates."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier import draws
from luthier.errors import LuthierError
from luthier.kinds import GradientTransform, Now, Optimizer, Seen, State
from luthier.models.sharding import put
from luthier.tune import Trained, Tune
from luthier.tune.trained import migrate


@dataclass(frozen=True)
class Link:
    """One part of the chain under its own slot."""

    slot: str
    part: GradientTransform | Optimizer
    own: bool = False
    """It came with a technique that trains, and is for that technique's tensors alone."""

    def takes(self, trained: Trained) -> bool:
        """Whether this part is for a tensor."""
        return (not self.own or trained.slot == self.slot) and (self.part.takes is None or self.part.takes(trained))


class Chain:
    """Takes the step. Every trained tensor has exactly one optimizer: the first in the chain that takes it.

    Args:
        links: the parts in order.
        tune: what trains; masters are written and pushed through it.

    Raises:
        LuthierError: a tensor has no optimizer, or a part takes nothing.
    """

    def __init__(self, links: Sequence[Link], tune: Tune) -> None:
        self.links, self.tune = tuple(links), tune
        self.state: dict[str, dict[str, State]] = {link.slot: {} for link in links}
        self.optimizer_of: dict[str, str] = {}
        self.watching: frozenset[str] = frozenset()
        """Names of tensors whose gradients are kept until the step's end, for those who look at them."""
        self.observed: frozenset[str] = frozenset()
        """The same for this step alone, for observers."""
        self.received: dict[str, Tensor] = {}
        """What the optimizers received in this step."""
        self.came: dict[str, Tensor] = {}
        """The norms that these had when they came, before anything was done to them."""
        tune.moved, tune.renewed, tune.left, tune.seeded = self.move, self._assign, self.leave, self.seed
        for trained in tune.trained.values():
            self._assign(trained)
        for link in links:
            if not self.taken(link):
                raise LuthierError(
                    f"`{link.slot}` takes none of what trains",
                    where="optimizer",
                    fix="leave it out, or train tensors it is made for",
                )

    def rest(self) -> None:
        """Forget all that optimizers and transforms remember."""
        self.state = {link.slot: {} for link in self.links}
        self.received.clear()
        self.came.clear()

    def taken(self, link: Link) -> list[str]:
        """Names of the tensors a part takes; for an optimizer, those that are its own."""
        if isinstance(link.part, Optimizer):
            return [name for name, slot in self.optimizer_of.items() if slot == link.slot]
        return [trained.name for trained in self.tune.trained.values() if link.takes(trained)]

    def _assign(self, trained: Trained) -> None:
        """Begin the state of a tensor, or begin it anew."""
        for link in self.links:
            if isinstance(link.part, Optimizer):
                if not link.takes(trained) or self.optimizer_of.setdefault(trained.name, link.slot) != link.slot:
                    continue
            elif not link.takes(trained):
                continue
            self.state[link.slot][trained.name] = link.part.init(trained)
        if trained.name not in self.optimizer_of:
            raise LuthierError(
                f"no optimizer takes `{trained.name}`", where="optimizer", fix="add one for the rest, e.g. adamw, at the end"
            )

    def move(self, trained: Trained, take: Tensor, old_size: int) -> None:
        """Let state follow entries that were rearranged: those that stay keep their moments, new ones start at zero."""
        for states in self.state.values():
            state = states.get(trained.name, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim == trained.master.ndim:
                    state[key] = migrate(value, trained.axis, take, old_size)

    def leave(self, trained: Trained) -> None:
        """Drop the state of a tensor."""
        for states in self.state.values():
            states.pop(trained.name, None)
        self.optimizer_of.pop(trained.name, None)

    def seed(self, trained: Trained, is_new: Tensor, seen: Seen) -> None:
        """Tell a tensor's optimizer what is known of the gradients of new entries."""
        slot = self.optimizer_of[trained.name]
        for link in self.links:
            if link.slot == slot and isinstance(link.part, Optimizer) and link.part.seed is not None:
                link.part.seed(self.state[slot][trained.name], is_new, seen)

    def factor(self, names: Collection[str]) -> float:
        """How much longer the gradients of some tensors were when their optimizers received them in this step than when they came; where
        these are zero, what all that was kept tells, since a joint norm scales everything alike."""
        for some in (names, self.received):
            kept = [name for name in some if name in self.received]
            came = math.hypot(*(float(self.came[name]) for name in kept))
            if came:
                return math.hypot(*(float(self.received[name].norm()) for name in kept)) / came
        return 1.0

    def step(self, now: Now, only: Trained | None = None) -> None:
        """Move every tensor that has a gradient, or one of them, and free the gradients."""
        watching = self.watching | self.observed
        todo = [only] if only is not None else [one for one in self.tune.trained.values() if one.gradient is not None]
        values: dict[str, Tensor] = {one.name: one.gradient for one in todo if one.gradient is not None}
        if self.observed:
            self.came.update((name, values[name].norm()) for name in watching if name in values)
        with torch.no_grad():
            for i, link in enumerate(self.links):
                mine = [one for one in todo if one.name in values and one.name in self.state[link.slot]]
                if isinstance(link.part, Optimizer):
                    for one in mine:
                        if one.name in watching:
                            self.received[one.name] = values[one.name].clone()
                        later = any(one.name in self.state[after.slot] for after in self.links[i + 1 :])
                        update = self._optimize(link, link.part, one, values.pop(one.name), now, later)
                        one.gradient = None
                        if update is not None:
                            values[one.name] = update
                elif mine:
                    self._transform(link, link.part, mine, values, now)
            for one in todo:
                if one.name in values:
                    self._write(one, _wide(one) + values[one.name], now)
                one.gradient = None

    def _optimize(self, link: Link, part: Optimizer, one: Trained, gradient: Tensor, now: Now, later: bool) -> Tensor | None:
        """Move the master; return the update instead when something behind the optimizer still works on it."""
        state = self.state[link.slot][one.name]
        master = one.master.data
        own = master.dtype == gradient.dtype
        if gradient.stride() != master.stride():
            # Fused optimizers walk memory and would pair the wrong numbers.
            gradient = torch.empty_like(master, dtype=gradient.dtype).copy_(gradient)
        if own and not later:
            part.step(master, gradient, state, one, now)
            self.tune.push(one)
            return None
        before = master.to(gradient.dtype)
        value = before.clone()
        part.step(value, gradient, state, one, now)
        if later:
            return value.sub_(before)
        self._write(one, value, now)
        return None

    def _transform(self, link: Link, part: GradientTransform, mine: list[Trained], values: dict[str, Tensor], now: Now) -> None:
        states = [self.state[link.slot][one.name] for one in mine]
        if part.scope == "all":
            present = [(one, state) for one, state in zip(mine, states, strict=True) if one.name in values]
            new = part.update([values[one.name] for one, _ in present], [s for _, s in present], [o for o, _ in present], now)
            values.update({one.name: value for (one, _), value in zip(present, new, strict=True)})
            return
        for one, state in zip(mine, states, strict=True):
            if one.name in values:
                value = part.update(values.pop(one.name), state, one, now)
                if value is not None:
                    values[one.name] = value

    def _write(self, one: Trained, value: Tensor, now: Now) -> None:
        if one.master.dtype == value.dtype:
            one.master.data.copy_(value)
        else:
            rng = draws.generator(now.seed, "round", one.name, now.step, device=value.device)
            one.master.data.copy_(round_stochastically(value, one.master.dtype, rng))
        self.tune.push(one)

    def tensors(self) -> dict[str, Any]:
        """All state as one flat dictionary, for a checkpoint."""
        return {
            f"{slot}|{name}|{key}": value
            for slot, states in self.state.items()
            for name, state in states.items()
            for key, value in state.items()
        }

    def load(self, values: dict[str, Any]) -> None:
        """Restore what `tensors` gave."""
        for path, value in values.items():
            slot, name, key = path.split("|", 2)
            before = self.state[slot][name].get(key)
            if isinstance(before, Tensor) and before.shape == value.shape:
                # In place: device and strides must stay those of the master.
                put(before, value)
            else:
                device = self.tune.trained[name].master.device
                self.state[slot][name][key] = value.to(device) if isinstance(value, Tensor) else value


def _wide(one: Trained) -> Tensor:
    return one.master.data.to(torch.promote_types(one.master.dtype, torch.float32))


def round_stochastically(value: Tensor, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Round fp32 to bf16 up or down with the odds of the distance, so that small updates are right on average."""
    if dtype != torch.bfloat16 or value.dtype != torch.float32:
        return value.to(dtype)
    # bf16 is the upper half of fp32: adding 16 random bits carries over with the odds wanted.
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, value.shape, generator=rng, dtype=torch.int32, device=value.device)
    return ((bits + noise) & ~0xFFFF).view(torch.float32).to(dtype)
