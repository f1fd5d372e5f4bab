"""A toy source without backward: the slope along one random direction (Malladi et al., 2023, algorithm 1)."""

from __future__ import annotations

import torch

from luthier import draws
from luthier.kinds import Pass, Source
from luthier.registry import method


@method(title="Zeroth order")
def zeroth_order(*, scale: float = 1e-3) -> Source:
    """Take the loss at two points beside the weights; their difference is the gradient along the line between them.

    Args:
        scale: half the distance of the points.
    """

    def gradients(work: Pass) -> None:
        start = {one.name: one.master.detach().clone() for one in work.trained}
        noise = {}
        for name, values in start.items():
            rng = draws.generator(work.now.seed, "zeroth order", work.now.step, name)
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
            work.apply(one)

    return Source(gradients, gives=frozenset())
