"""A toy penalty: the squared distance of what trains from where it started."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import LossTerm, Tensors, View
from luthier.registry import method


@method(title="Pull to the start", reduces_to="weight 0: no penalty")
def pull_to_start(*, weight: float = 0.01) -> LossTerm:
    """Pull every trained number to its first value.

    Args:
        weight: multiplies the penalty.
    """

    def total(view: View, own: Tensors) -> Tensor:
        assert view.services is not None and view.state is not None
        distance = view["nll"].new_zeros(())
        for one in view.services.trained():
            start = view.state.setdefault(f"start {one.name}", one.master.detach().clone())
            if start.shape == one.value.shape:
                distance = distance + (one.value.to(start.dtype) - start).square().sum()
        return distance

    return LossTerm(total, unit="step", weight=weight, penalty=True)
