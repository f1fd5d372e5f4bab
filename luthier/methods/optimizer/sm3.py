"""SM3 (Anil et al., 2019), algorithm SM3-II: Adagrad whose sums are kept for whole rows and columns instead of every entry."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Callback, Now, Optimizer, Services, State, TrainedLike
from luthier.methods.optimizer._accumulators import accumulate, accumulate_entries, accumulators
from luthier.registry import method


@method(
    title="SM3",
    paper="arXiv:1901.11150",
    reduces_to="vectors, momentum 0: Adagrad",
    departs="accumulators never fall, also where entries come and go; momentum is 0 where the paper has 0.9",
)
def sm3(*, momentum: float = 0.0, weight_decay: float = 0.0, epsilon: float = 1e-30) -> tuple[Optimizer, Callback]:
    """Divide each gradient by the root of a bound on its summed squares: the smaller of its row's and its column's accumulator.

    A matrix [O, I] costs O + I numbers, a vector as many as it has. Scattered entries share the accumulators of the rows and columns
    they stand in, which stay when entries come and go.

    Args:
        momentum: share of the last step's direction that is kept; 0 keeps no state and is what sparse fine-tuning with SM3 uses.
        weight_decay: weight decay, taken off the weights directly and multiplied with the learning rate; 0, as for the other optimizers.
        epsilon: added under the root; it only keeps 0 / 0 away.

    Raises:
        LuthierError: an option is out of its range.
    """
    if not 0.0 <= momentum < 1.0:
        raise LuthierError(f"the momentum is {momentum}", where="sm3: momentum", fix="use 0 to below 1")
    if weight_decay < 0.0:
        raise LuthierError(f"the weight decay is {weight_decay}", where="sm3: weight_decay", fix="use 0 or more")
    if epsilon <= 0.0:
        raise LuthierError(f"epsilon is {epsilon}", where="sm3: epsilon", fix="use more than 0, e.g. 1e-30")
    # Where a row ends is told neither by scattered entries nor by their index. These are facts of the model: nothing to save.
    shapes: WeakKeyDictionary[TrainedLike, tuple[int, ...]] = WeakKeyDictionary()

    def start(services: Services) -> State:
        for one in services.trained():
            if one.place is not None and one.form not in ("factor", "free"):
                shapes[one] = tuple(services.shape(one.place))
        return {}

    def init(trained: TrainedLike) -> State:
        values = trained.master
        wide = torch.promote_types(values.dtype, torch.float32)
        return {"direction": torch.zeros_like(values, dtype=wide)} if momentum else {}

    def step(value: Tensor, gradient: Tensor, state: State, trained: TrainedLike, now: Now) -> None:
        direction = gradient * (_bound(gradient, state, trained) + epsilon).rsqrt()
        if momentum:
            direction = state["direction"].lerp_(direction, 1 - momentum)
        rate = now.learning_rate * trained.rate
        if weight_decay and trained.decay:
            value.sub_(rate * weight_decay * (value if trained.anchor is None else value - trained.anchor))
        value.sub_(rate * direction)

    def _bound(gradient: Tensor, state: State, trained: TrainedLike) -> Tensor:
        scattered = trained.form == "flat" and trained.index is not None and len(shapes[trained]) == 2
        shape = shapes[trained] if scattered else tuple(gradient.shape) or (1,)
        names = [f"sums {axis}" for axis in range(len(shape))]
        if names[0] not in state:
            state.update(zip(names, accumulators(shape, gradient), strict=True))
        sums = [state[name] for name in names]
        if scattered:
            assert trained.index is not None
            return accumulate_entries(sums[0], sums[1], trained.index, gradient)
        return accumulate(sums, gradient.reshape(shape)).reshape(gradient.shape)

    return Optimizer(init, step), Callback(start=start)
