"""A toy source that all processes compute alike: the slope along one random direction, as a gradient of the whole step."""

from __future__ import annotations

from luthier.kinds import GradientEstimator, Pass
from luthier.registry import method
from tests.toys.gradient_estimator._two_points import set_slope


@method(title="Slope")
def slope(*, scale: float = 1e-3) -> GradientEstimator:
    """Take the loss at two points; their difference, along the line between them, is the gradient that the optimizer gets.

    Args:
        scale: half the distance of the points.
    """

    def gradients(work: Pass) -> None:
        set_slope(work, "slope", scale)

    return GradientEstimator(gradients, gives=frozenset({"all"}))
