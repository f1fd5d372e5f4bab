"""How far apart two right ways to the same numbers may end: from the arithmetic, not from what one processor happened to give.

Two kernels, two shapes of a batch or two orders of a sum give the same numbers but for rounding; a bound on it needs the number type,
how many roundings follow each other, how large the numbers are on the way, and how much what follows magnifies. Bit for bit only what the
same kernel makes of the same shapes is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TINY = 2 * (32 + 32 + 32 + 96) + 32
"""Roundings that one logit of a tiny model of two blocks goes through: the lengths of the sums of its products, from the map into attention
to the head."""


def rounding(dtype: torch.dtype, terms: int = 1, *, size: float = 1.0, condition: float = 1.0) -> float:
    """How far two results may be apart.

    Each rounding is off by at most half an eps of the number that is rounded, and many in a row walk at random, so that they end a root
    of their number from where they began (Higham, Accuracy and Stability of Numerical Algorithms, section 2.8). Both results may be four
    such distances off: 4 eps sqrt(terms) size condition.

    Args:
        dtype: the narrowest number type on the way.
        terms: roundings that one number goes through: the length of a sum, or steps one behind the other.
        size: the largest magnitude on the way; what cancels may leave a result far below it.
        condition: by how much what follows magnifies an error.
    """
    return float(4.0 * torch.finfo(dtype).eps * terms**0.5 * size * condition)


def assert_rounded(
    found: Tensor,
    wanted: Tensor,
    terms: int = 1,
    *,
    dtype: torch.dtype | None = None,
    size: float | None = None,
    condition: float = 1.0,
    what: object = "",
) -> None:
    """The same numbers but for rounding.

    Args:
        found: what was computed.
        wanted: the same, computed in another way.
        terms: as `rounding` takes it.
        dtype: as `rounding` takes it; None: the narrower of the two.
        size: as `rounding` takes it; None: the largest magnitude in `wanted`.
        condition: as `rounding` takes it.
        what: said when it fails.
    """
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    narrow = max(found.dtype, wanted.dtype, key=lambda one: torch.finfo(one).eps) if dtype is None else dtype
    largest = float(wanted.detach().abs().max()) if size is None else size
    bound, apart = rounding(narrow, terms, size=largest, condition=condition), float((found - wanted).detach().abs().max())
    assert apart <= bound, f"{what}: {apart:.3g} apart where rounding leaves {bound:.3g}"


class Exactly(TorchFunctionMode):
    """Models in fp64 that compute some of their numbers in fp32, such as norms, do so in fp64.

    Gradients that are added before such a norm in one layout and behind it in another differ by fp32's rounding, which would hide a mistake
    of that size. What a checkpoint runs again is not reached.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if wide and (func is Tensor.float or (func is Tensor.to and torch.float32 in (*args, *options.values()))):
            return args[0]
        if wide and options.get("dtype") == torch.float32:
            options.pop("dtype")
        return func(*args, **options)
