"""Parameters that a module reads with the deltas in them: for modules that are no linear map, so that nothing can act beside one.

A router chooses by what it computes, and experts multiply with slices of a stack of matrices. While such a module runs, what its forward
pass finds under a parameter's name is the weight plus the deltas on it. Other names for the parameter, and the model's own lists of
parameters, still find the frozen one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from luthier.kinds.parts import outputs_first

if TYPE_CHECKING:
    from luthier.tune.sites import Addition


class StandIns:
    """What stands in for the parameters of one module while it runs.

    Args:
        module: a router, or experts.
        is_off: whether the parameters are to be read as they are.
        additions: the deltas on its parameters.
        transposed: modules that store inputs before outputs.
    """

    def __init__(
        self, module: nn.Module, is_off: Callable[[], bool], additions: Callable[[], Sequence[Addition]], transposed: frozenset[str]
    ) -> None:
        self.module, self.additions, self.transposed = module, additions, transposed
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
            if self.gone or is_off() or not additions():
                return plain(*arguments, **named)
            if not is_grad_enabled() or not any(addition.stacked for addition in additions()):
                return run(*arguments, **named)
            # Made again in backward: no block's matrices are kept for each pass.
            return checkpoint(run, *arguments, use_reentrant=False, **named)

        self.forward = module.forward = forward

    @property
    def room(self) -> int:
        """Bytes that stand-ins of experts take at the most: in backward there are all of them, their gradients, and one more."""
        names = {addition.place.tensor for addition in self.additions() if addition.stacked and addition.place is not None}
        sizes = [self.module.get_parameter(name).nbytes for name in names]
        return 2 * sum(sizes) + max(sizes, default=0)

    def made(self) -> dict[str, Tensor]:
        """Each parameter with the deltas on it, as the module stores it, by name."""
        made: dict[str, Tensor] = {}
        for addition in self.additions():
            place = addition.place
            assert place is not None
            stored = made.get(place.tensor, self.module.get_parameter(place.tensor))
            change = addition.delta(addition.tensors(stored.dtype))
            made[place.tensor] = stored + outputs_first(change, place, self.transposed)
        return made

    def detach(self) -> None:
        """Let the module read its own parameters again."""
        self.gone = True
        # Another tune may stand over this one at the same module.
        if self.module.__dict__.get("forward") is self.forward:
            del self.module.forward
            if self.before is not None:
                self.module.forward = self.before
