"""A toy source that all processes compute alike: the slope along one random direction, as a gradient of the whole step."""

from __future__ import annotations

import torch

from luthier import draws
from luthier.kinds import Pass, Source
from luthier.registry import method


@method(title="Slope")
def slope(*, scale: float = 1e-3) -> Source:
    """Take the loss at two points; their difference, along the line between them, is the gradient that the optimizer gets.

    Args:
        scale: half the distance of the points.
    """

    def gradients(work: Pass) -> None:
        start = {one.name: one.master.detach().clone() for one in work.trained}
        noise = {}
        for name, values in start.items():
            rng = draws.generator(work.now.seed, "slope", work.now.step, name)
            wide = torch.promote_types(values.dtype, torch.float32)
            noise[name] = torch.randn(values.shape, generator=rng).to(values.device, wide)
        losses = []
        for side in (scale, -scale):
            for one in work.trained:
                work.write(one, start[one.name] + side * noise[one.name])
            losses.append(work.loss())
        for one in work.trained:
            work.write(one, start[one.name])
            one.gradient = noise[one.name] * ((losses[0] - losses[1]) / (2 * scale))

    return Source(gradients, gives=frozenset({"all"}))
