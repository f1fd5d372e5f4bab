"""A toy source without backward: the slope along one random direction, and each tensor's step at once."""

from __future__ import annotations

from luthier.kinds import GradientEstimator, Pass
from luthier.registry import method
from tests.toys.gradient_estimator._two_points import set_slope


@method(title="Zeroth order")
def zeroth_order(*, scale: float = 1e-3) -> GradientEstimator:
    """Take the loss at two points beside the weights; their difference is the gradient along the line between them.

    Args:
        scale: half the distance of the points.
    """

    def gradients(work: Pass) -> None:
        set_slope(work, "zeroth order", scale)
        for one in work.trained:
            work.apply(one)

    return GradientEstimator(gradients, gives=frozenset())
