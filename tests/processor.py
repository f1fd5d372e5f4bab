"""What the processor that runs the tests can do."""

from __future__ import annotations

import os
import platform
import time
from functools import lru_cache
from pathlib import Path

import torch

SLOW = 4.0
"""Times as long as in fp32. With units for bf16 a product takes less than in fp32, without them up to a hundred times as long."""


def _seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(256, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return best


@lru_cache(maxsize=1)
def multiplies_bf16() -> bool:
    """Whether products in bf16 are as quick as the processor is: measured, since libraries may be told to leave units unused."""
    _seconds(torch.float32)
    return _seconds(torch.bfloat16) < SLOW * _seconds(torch.float32)


def describe() -> str:
    """Model, cores, instructions that torch uses, bf16 and load, in a line."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    narrow = "quick" if multiplies_bf16() else "slow"
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return f"{model}, {os.cpu_count()} cores, torch uses {torch.backends.cpu.get_cpu_capability()}, bf16 products are {narrow}, load {load}"
