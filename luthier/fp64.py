"""Arithmetic in fp64, which some devices do not have: whoever wants more digits than fp32 asks here, and nobody else widens to fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WITHOUT_FP64 = frozenset({"mps"})
"""Types of devices that have no fp64: Apple's."""


def available(device: torch.device | str) -> bool:
    """Whether a device computes in fp64."""
    return torch.device(device).type not in WITHOUT_FP64


def widest(device: torch.device | str) -> torch.dtype:
    """The widest type of a device: fp64, else fp32."""
    return torch.float64 if available(device) else torch.float32


def widened(values: Tensor) -> Tensor:
    """The same numbers in fp64: on their device, or on the processor where that has no fp64."""
    return values.double() if available(values.device) else values.cpu().double()


def on_device(values: Tensor) -> Tensor:
    """The same numbers in the widest type of their device, on it."""
    return values.to(widest(values.device))


def computed(compute: Callable[..., Tensor], values: Tensor, *others: Tensor) -> Tensor:
    """What is computed in fp64, on the device of `values`: there, or on the processor and then rounded to fp32.

    Args:
        compute: gets the values in fp64, and the others as they are, all on one device.
        values: what to compute with.
        others: what belongs to them, such as places.
    """
    if available(values.device):
        return compute(values.double(), *others)
    return compute(widened(values), *(one.cpu() for one in others)).to(torch.float32).to(values.device)


def total(values: Tensor) -> float:
    """The sum in fp64, without a copy of the numbers in it."""
    here = values.detach() if available(values.device) else values.detach().cpu()
    return float(here.sum(dtype=torch.float64))


def norm(values: Tensor) -> float:
    """The Euclidean norm, summed in fp64 without a copy of the numbers in it."""
    here = values.detach() if available(values.device) else values.detach().cpu()
    here = here.to(torch.promote_types(here.dtype, torch.float32))
    return float(torch.linalg.vector_norm(here, dtype=torch.float64))
