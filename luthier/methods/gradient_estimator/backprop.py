"""Backpropagation: the gradient of every micro-batch, summed."""

from __future__ import annotations

from luthier.kinds import GradientEstimator, Pass
from luthier.registry import method


@method(title="Backpropagation")
def backprop() -> GradientEstimator:
    """Run every micro-batch forward and backward; the step follows when all gradients are there."""

    def gradients(work: Pass) -> None:
        for batch in work.batches:
            work.backward(batch)

    return GradientEstimator(gradients)
