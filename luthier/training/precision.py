"""Which number types a run uses."""

from __future__ import annotations

import torch

from luthier.errors import LuthierError

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16 itself; emulation is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        features = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, feature, lambda: False)() for feature in features)
    return device.type == "mps"


def pick(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The type weights and computation have, and why.

    Args:
        name: `auto` (bf16 where the hardware has it, else fp32), `bf16`, `fp32` or `fp64`.
        device: where the run computes.
    """
    if name == "auto":
        if native_bf16(device):
            return torch.bfloat16, "bf16: this hardware computes in it"
        return torch.float32, "fp32: this hardware has no bf16 of its own"
    if name not in TYPES:
        raise LuthierError(f"there is no precision `{name}`", where="train.precision", fix="use auto, bf16, fp32 or fp64")
    return TYPES[name], f"{name}: the recipe asks for it"


def pick_device(name: str) -> torch.device:
    """The device: a name, or the best there is for `auto`.

    Raises:
        LuthierError: this machine has no such device.
    """
    if name != "auto":
        return _named(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _named(name: str) -> torch.device:
    kind, _, number = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    known = [f"{one}:{i}" if one == "cuda" else one for one, count in counts.items() for i in range(count)]
    if not (name in known or (kind in counts and not number and counts[kind])):
        raise LuthierError(
            f"there is no device `{name}` on this machine", where="train.device", fix=f"use auto, or one of: {', '.join(known)}"
        )
    return torch.device(name)
