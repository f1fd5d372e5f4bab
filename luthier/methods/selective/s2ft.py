"""S2FT (Yang et al., 2024), section 3: whole heads and channels are selected, and one dense slice of a weight trains for each."""

from __future__ import annotations

import math
from typing import Literal

import torch

from luthier.errors import LuthierError
from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.methods.selective._entries import largest
from luthier.methods.selective._units import pool_of, scores, selects
from luthier.registry import method


@method(
    title="S2FT",
    paper="arXiv:2412.06289",
    row=62,
    reduces_to="share 1 of a projection: its whole weight, which weight decay pulls towards the base",
    departs="the paper moves selected units together, so that a slice is contiguous in memory: here they train where they are, which is "
    "the same mathematics, keeps the model comparable with its base, and holds for grouped-query attention; gradients by which units "
    "are chosen are those of plain cross-entropy without dropout, whatever the run minimizes",
    merges="is in place",
    learning_rate=2e-4,
    replication="s2ft",
)
def s2ft(
    *,
    value: float = 0.0,
    output: float = 0.0,
    up: float = 0.0,
    down: float = 0.03,
    by: Literal["random", "weight", "activation", "weight_activation", "gradient"] = "random",
    prefer: Literal["smallest", "largest"] = "smallest",
    calibration_rows: int = 128,
    calibration_source: str = "",
) -> Selective:
    """Train slices of weights that belong to some heads and some channels of the MLP; biases stay frozen.

    Weight decay pulls what trains towards the base: the paper's slices are added to the weight and begin at zero.

    Each projection selects for itself, among the units of all blocks together: a block may get many or none. The defaults are the
    paper's for Llama-3-8B; for Llama-2-7B it uses an output of 0.052 and a down of 0.02.

    Args:
        value: share of the key-value heads whose rows of the value projection train.
        output: share of the query heads whose columns of attention's output projection train.
        up: share of the channels whose rows of the MLP's up projection train.
        down: share of the channels whose columns of the MLP's down projection train.
        by: at random (the paper's default), or by the norm of a unit's slice (`weight`), of what it computes on calibration rows
            (`activation`), by the product of both, or by the norm of its slice of the loss's gradient.
        prefer: which units a ranking prefers; the paper finds the smallest activations best, and the largest worse than random.
        calibration_rows: rows for rankings by activation or gradient.
        calibration_source: where these rows come from, named as under `rows` in a recipe; empty for the training rows.
    """
    shares = {"value": value, "output": output, "up": up, "down": down}
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise LuthierError(f"the share is {share}", where=f"s2ft: {name}", fix="use 0 to 1")
    if not any(shares.values()):
        raise LuthierError("every share is 0, so nothing trains", where="s2ft", fix="give one of value, output, up and down more")
    if calibration_rows < 1:
        raise LuthierError(f"there are {calibration_rows} rows", where="s2ft: calibration_rows", fix="use at least 1")

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        wanted = {name: share for name, share in shares.items() if share}
        return {place: select for name, share in wanted.items() for place, select in draw(name, share, parts, services).items()}

    def draw(name: str, share: float, parts: Parts, services: Services) -> dict[Place, Select]:
        pool = pool_of(name, parts, services)
        total = sum(cut.units for cut in pool)
        # The tolerance is for shares such as 0.29, of which a hundred is less than 29 in binary.
        count = math.floor(share * total + 1e-9)
        if not count:
            raise LuthierError(
                f"a share of {share} of {total} units is none", where=f"s2ft: {name}", fix=f"use 0, or at least {1 / total:.3g}"
            )
        if by == "random":
            drawn = torch.randperm(total, generator=services.rng(f"s2ft {name}"))[:count].sort().values
        else:
            score = scores(by, pool, services, lambda: services.batches(calibration_rows, calibration_source))
            drawn = largest(score if prefer == "largest" else -score, count)
        return selects(pool, drawn)

    return Selective(choose)
