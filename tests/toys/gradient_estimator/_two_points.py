"""The slope of a step's loss along one random direction (Malladi et al., 2023, algorithm 1)."""

from __future__ import annotations

import torch

from luthier import draws
from luthier.kinds import Pass


def set_slope(work: Pass, name: str, scale: float) -> None:
    """Take the loss at two points beside the weights; their difference, along the line between them, becomes the gradient.

    Args:
        work: the step.
        name: of who draws the direction.
        scale: half the distance of the points.
    """
    start = {one.name: one.master.detach().clone() for one in work.trained}
    noise = {}
    for tensor, values in start.items():
        rng = draws.generator(work.now.seed, name, work.now.step, tensor)
        wide = torch.promote_types(values.dtype, torch.float32)
        noise[tensor] = torch.randn(values.shape, generator=rng).to(values.device, wide)
    losses = []
    for side in (scale, -scale):
        for one in work.trained:
            work.write(one, start[one.name] + side * noise[one.name])
        losses.append(work.loss())
    for one in work.trained:
        work.write(one, start[one.name])
        one.gradient = noise[one.name] * ((losses[0] - losses[1]) / (2 * scale))
