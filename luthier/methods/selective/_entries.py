"""Ranking the entries of matrices, and following them from one selection to the next.

Of equal scores the first wins, so that every process and every resumed run selects the same entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Services


def matrix(place: Place, services: Services) -> Tensor:
    """The live weight at a place, [O, I], in fp32 or wider.

    Raises:
        LuthierError: it is no matrix, it is packed, or it holds what is no finite number.
    """
    weight_OI = services.weight(place)
    if weight_OI.ndim != 2 or not weight_OI.is_floating_point():
        raise LuthierError(
            f"`{services.slot}` selects among the entries of matrices, and this is none",
            where=str(place),
            fix="name module types of linear maps in an unpacked model, e.g. linear or mlp_down",
        )
    if not bool(weight_OI.isfinite().all()):
        raise LuthierError(f"`{services.slot}` cannot rank weights that are not finite", where=str(place), fix="repair the model")
    return weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))


def largest(score: Tensor, count: int) -> Tensor:
    """Positions [count] of the largest numbers of a whole tensor, counted in row-major order, ascending."""
    return _positions(_is_largest(score.flatten(), count))


def largest_of_rows(score_OI: Tensor, count: int) -> Tensor:
    """Positions [O * count] of the largest numbers of every row, counted in the flattened matrix, ascending."""
    return _positions(_is_largest(score_OI, count))


def _is_largest(score: Tensor, count: int) -> Tensor:
    """True at the `count` largest numbers along the last dimension."""
    if bool(score.isnan().any()):
        raise LuthierError(
            "a score by which numbers are selected is not a number",
            where="tune",
            fix="look at the calibration rows, or use precision: fp32",
        )
    least = score.topk(count).values[..., -1:]
    above, equal = score > least, score == least
    # topk leaves open which of equal numbers it takes.
    room = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def _positions(chosen: Tensor) -> Tensor:
    return chosen.flatten().nonzero().squeeze(1)


def continued(old: Tensor, new: Tensor) -> Tensor:
    """For each entry of a new index its place in the old one, or -1. Both ascend."""
    at = torch.searchsorted(old, new).clamp(max=len(old) - 1)
    return torch.where(old[at] == new, at, -1)
