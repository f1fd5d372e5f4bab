"""A micro-batch run on shapes alone: what autograd keeps, without computing or holding any of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.kinds import Batch, Now
from luthier.training.engine import Engine
from luthier.training.world import World


class Peak(NamedTuple):
    """Most bytes alive at once, beside what was there before."""

    total: int
    activations: int
    """Without the gradients that wait for the step: what autograd keeps, logits and what is made on the way."""
    gradients: int
    """Most gradients that wait for the step."""


class ShapesOnly(TorchDispatchMode):
    """Numbers become shapes, and their bytes are counted while they live.

    Whole numbers and truth values are computed as ever: token ids, masks and labels decide which way a model goes and which shapes
    follow. A number that is read out of shapes, such as a loss that is checked to be finite, is 0.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.waiting = 0
        self.peak = Peak(0, 0, 0)
        self._fake = FakeTensorMode()
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func.namespace == "prim":
            # Questions about a tensor, not work on it.
            return func(*args, **options)
        tensors = _tensors((*args, *options.values()))
        if _is_whole(func, tensors, args, options):
            made = func(*args, **options)
        elif func is torch.ops.aten._local_scalar_dense.default and tensors[0].is_floating_point():
            return 0.0
        else:
            shapes = {name: self._shape_of(one) for name, one in options.items()}
            with self._fake:
                made = func(*[self._shape_of(one) for one in args], **shapes)
        for one in _tensors((made,)):
            self._follow(one, counted=True)
        return made

    def _shape_of(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(self._shape_of, value))
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        fake = self._fake.from_tensor(value)
        self._follow(fake, counted=False)
        return fake

    def _follow(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self._known.add(key)
        weakref.finalize(storage, self._freed, key, size)
        self.live += size
        self.note()

    def note(self) -> None:
        """Compare what is alive with the most so far."""
        total, activations, gradients = self.peak
        self.peak = Peak(max(total, self.live), max(activations, self.live - self.waiting), max(gradients, self.waiting))

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, which nest one list deep."""
    nested = chain.from_iterable(one if isinstance(one, list | tuple) else (one,) for one in values)
    return [one for one in nested if isinstance(one, Tensor)]


def _is_whole(func: Any, tensors: Sequence[Tensor], args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    if tensors:
        return not any(isinstance(one, FakeTensor) or one.is_floating_point() for one in tensors)
    dtype = options.get("dtype")
    if dtype is None:
        return func.overloadpacket is torch.ops.aten.arange and all(isinstance(one, int) for one in args)
    return not dtype.is_floating_point and not dtype.is_complex


def peak_of(engine: Engine, batches: Sequence[Batch], now: Now) -> Peak:
    """Most bytes alive at once while one step's micro-batches run forward and backward, beside weights, masters and moments.

    Nothing is computed and nothing of the run changes. Gradients stay from one micro-batch to the next, unless the source of gradients
    frees each as it arrives.

    Args:
        engine: what is attached.
        batches: a step's micro-batches, in order.
        now: the clock; its step decides what techniques do.

    Raises:
        RuntimeError: shapes depend on numbers (experts chosen by a router), or the objective cannot run on shapes.
    """
    tune = engine.tune
    units = engine.objective.units(batches, None, World())
    with _left_alone(engine), torch.compiler.set_stance("force_eager"), ShapesOnly() as shapes:
        tune.model.train()
        tune.arrived = _arrival(engine, shapes)
        for i, batch in enumerate(batches):
            services_of = lambda slot: engine.services(slot, now)  # noqa: E731
            sums = engine.objective.total(tune, batch, units, now, first=i == 0, services_of=services_of)
            if sums.loss.requires_grad:
                sums.loss.backward()
            del sums
        peak: Peak = shapes.peak
        return peak


def _arrival(engine: Engine, shapes: ShapesOnly) -> Callable[[Any], None]:
    """What happens to a gradient that is complete: it waits, or its tensor takes its step and it is freed."""
    waiting: set[str] = set()

    def wait(trained: Any) -> None:
        if trained.name not in waiting:
            waiting.add(trained.name)
            shapes.waiting += trained.gradient.nbytes
            shapes.note()

    def free(trained: Any) -> None:
        trained.gradient = None

    return wait if "all" in engine.source.gives else free


@contextmanager
def _left_alone(engine: Engine) -> Iterator[None]:
    """Take back whatever a pass over shapes leaves behind in the run."""
    tune = engine.tune
    training, arrived = tune.model.training, tune.arrived
    states = {slot: dict(state) for slot, state in engine.states.items()}
    buffers = [(module, dict(module._buffers)) for module in tune.model.modules()]
    tune.only_shapes = True
    try:
        yield
    finally:
        tune.only_shapes, tune.arrived = False, arrived
        tune.free_gradients()
        for trained in tune.trained.values():
            trained.leaf.grad = None
        for slot, state in engine.states.items():
            state.clear()
            state.update(states[slot])
        for module, before in buffers:
            module._buffers.clear()
            module._buffers.update(before)
        tune.model.train(training)
