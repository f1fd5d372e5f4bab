"""Parameters that a module reads with the deltas in them: for modules that are no linear map, so that nothing can act beside one.

A router chooses by what it computes, and experts multiply with slices of a stack of matrices. While such a module runs, what its forward
pass finds under a parameter's name is the weight plus the deltas on it. Other names for the parameter, and the model's own lists of
parameters, still find the frozen one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.kinds.parts import outputs_first

if TYPE_CHECKING:
    from luthier.tune.sites import Addition
    from luthier.tune.trained import Trained


class StandIns:
    """What stands in for the parameters of one module while it runs.

    Args:
        module: a router, or experts.
        is_off: whether the parameters are to be read as they are.
        additions: the deltas on its parameters.
        slices: some experts' matrices, or biases, that train themselves.
        transposed: modules that store inputs before outputs.
    """

    def __init__(
        self,
        module: nn.Module,
        is_off: Callable[[], bool],
        additions: Callable[[], Sequence[Addition]],
        slices: Callable[[], Collection[Trained]],
        transposed: frozenset[str],
    ) -> None:
        self.module, self.additions, self.slices, self.transposed = module, additions, slices, transposed
        self.gone = False
        self.before = module.__dict__.get("forward")
        plain = module.forward

        def run(*arguments: Any, **named: Any) -> Any:
            made = self.made()
            # Found before the module's own parameters, which stay where they are.
            module.__dict__.update(made)
            try:
                return plain(*arguments, **named)
            finally:
                for name in made:
                    del module.__dict__[name]

        def forward(*arguments: Any, **named: Any) -> Any:
            if self.gone or is_off() or not (additions() or slices()):
                return plain(*arguments, **named)
            if not torch.is_grad_enabled() or not (slices() or any(addition.stacked for addition in additions())):
                return run(*arguments, **named)
            # Made again in backward: no block's matrices are kept for each pass.
            return checkpoint(run, *arguments, use_reentrant=False, **named)

        self.forward = module.forward = forward

    @property
    def room(self) -> int:
        """Bytes that stand-ins of experts take at the most: in backward there are all of them and their gradients, and while one is made
        what it is made of, in fp32 or wider."""
        places = [*(one.place for one in self.additions() if one.stacked), *(one.place for one in self.slices())]
        held = [self.module.get_parameter(name) for name in {place.tensor for place in places if place is not None}]
        making = [one.numel() * _wide(one).itemsize * (1 if one.dtype == _wide(one) else 3) for one in held]
        return 2 * sum(one.nbytes for one in held) + max(making, default=0)

    def made(self) -> dict[str, Tensor]:
        """Each parameter with what trains of it and the deltas on it, as the module stores it, by name: rounded once, as a merged one."""
        made: dict[str, Tensor] = {}
        for one in self.slices():
            assert one.place is not None and one.index is not None
            stored = self._stored(made, one.place.tensor)
            values = outputs_first(one.leaf.to(stored.dtype), one.place, self.transposed)
            made[one.place.tensor] = stored.index_copy(0, one.index, values)
        for addition in self.additions():
            place = addition.place
            assert place is not None
            stored = self._stored(made, place.tensor)
            wide = _wide(stored)
            change = outputs_first(addition.delta(addition.tensors(wide)), place, self.transposed)
            made[place.tensor] = (stored.to(wide) + change).to(stored.dtype)
        return made

    def _stored(self, made: dict[str, Tensor], name: str) -> Tensor:
        return made[name] if name in made else self.module.get_parameter(name)

    def detach(self) -> None:
        """Let the module read its own parameters again."""
        self.gone = True
        # Another tune may stand over this one at the same module.
        if self.module.__dict__.get("forward") is self.forward:
            del self.module.forward
            if self.before is not None:
                self.module.forward = self.before


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
