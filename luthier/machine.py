"""What this run runs on: versions, hardware, memory, and the widest numbers that its devices have.

Whoever wants more digits than fp32 asks here: some devices have no fp64, and nobody else widens to it.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import psutil
import torch
from torch import Tensor, nn

KERNELS = 64
"""Compiled products that oneDNN may keep: more than one micro-batch needs."""

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "datasets", "numpy")

WORTH_FREEING = 16 * 2**20
"""Bytes of models in this process, those that are in use among them, from which on a search for gone ones is worth its time."""

_LOADED: WeakSet[nn.Module] = WeakSet()

WITHOUT_FP64 = frozenset({"mps"})
"""Types of devices that have no fp64: Apple's."""


def versions() -> dict[str, str]:
    """Versions of what computes."""
    from luthier import __version__

    installed = {package: _installed(package) for package in PACKAGES}
    there = {package: number for package, number in installed.items() if number is not None}
    return {"python": platform.python_version(), "luthier": __version__, **there}


@cache
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """The machine, in a few facts."""
    facts: dict[str, str | int] = {
        "processor": _processor(),
        "system": platform.platform(terse=True),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int:
    return int(psutil.virtual_memory().total)


def bound_kernels() -> None:
    """Let oneDNN, and torch's interface to it, keep few compiled products; has no effect once bf16 was multiplied in this process.

    Every micro-batch has a size of its own, and each size compiles its products anew: a thousand of them, as is usual, take over 2 GB.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def reset_peak(device: torch.device) -> None:
    """Begin to measure peak memory anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak`: of the device on a GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = _told("/proc/self/status", "VmHWM")
    return peak or _peak_elsewhere()


def _peak_elsewhere() -> int:
    """What systems other than Linux tell: Windows the peak, macOS too, in bytes."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    resource: Any = importlib.import_module("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def watch(model: nn.Module) -> None:
    """Know of a model that was loaded, for as long as it exists."""
    _LOADED.add(model)


def free_what_is_gone() -> None:
    """Free the models that nothing holds any more: they lie in cycles, which Python frees only now and then.

    Looking for them goes through every object of torch and takes a third of a second, so a few small ones may wait for others.
    """
    tensors = (tensor for model in list(_LOADED) for tensor in (*model.parameters(), *model.buffers()))
    if sum(tensor.nbytes for tensor in tensors) >= WORTH_FREEING:
        gc.collect()


def keep_what_stands() -> None:
    """Leave what the process holds now out of the garbage collector's rounds: each of them would walk through all of torch again."""
    gc.collect()
    gc.freeze()


def free_broken_backward() -> None:
    """Free what a backward pass that broke off has left: torch keeps its graph, activations and all, until a thread's next one."""
    torch.ones((), requires_grad=True).backward()


@contextmanager
def as_found() -> Iterator[None]:
    """Give torch's number of threads and its random numbers back to the process as they were."""
    threads = torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def available_bytes(device: torch.device) -> int | None:
    """Memory that could still be had: of the device on a GPU, else of the system."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has reserved and does not use is free for its next tensors.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


def _told(file: str, key: str) -> int:
    """Bytes that Linux states under a key of a file; 0 elsewhere."""
    try:
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class CoreTime(NamedTuple):
    """What a thread had of the processor so far, in nanoseconds."""

    computed: int
    waited: int
    """Ready to compute, and every core taken."""


def core_times(threads: Path = Path("/proc/self/task")) -> dict[str, CoreTime]:
    """What each thread of this process had of the processor, as Linux counts it; nothing where the system does not tell."""
    found = {}
    for file in threads.glob("*/schedstat"):
        # A thread may end meanwhile.
        with suppress(OSError, ValueError):
            computed, waited, _ = file.read_text().split()
            found[file.parent.name] = CoreTime(int(computed), int(waited))
    return found


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Holds interrupts back inside the block, and from the processes that begin in it for as long as they live, where systems can.

    An interrupt reaches every process of a terminal; the one that began the others ends them. Training sets a handler of its own, so
    that processes which merely ignored interrupts would hear them again.
    """
    mask = getattr(signal, "pthread_sigmask", None)
    if mask is None:
        yield
        return
    before = mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        mask(signal.SIG_SETMASK, before)


def hear_interrupts() -> None:
    """Let interrupts through again that were held back from this process as it began."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def leave_group() -> None:
    """Stand in a group of processes of one's own, where there are groups: a terminal's interrupt then reaches the parent alone."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def interrupt(process: int) -> None:
    """Ask a process to finish its step, save and end. Windows knows no such question of one process: there it ends at once."""
    os.kill(process, signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)


def end_with_parent() -> None:
    """End this worker when the process that began it ends: one that was killed cannot end its workers, which would wait for ever."""
    threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def has_fp64(device: torch.device | str) -> bool:
    """Whether a device computes in fp64."""
    return torch.device(device).type not in WITHOUT_FP64


def widest_type(device: torch.device | str) -> torch.dtype:
    """The widest type of a device: fp64, else fp32."""
    return torch.float64 if has_fp64(device) else torch.float32


def widened(values: Tensor) -> Tensor:
    """The same numbers in fp64: on their device, or on the processor where that has no fp64."""
    return values.double() if has_fp64(values.device) else values.cpu().double()


def widest(values: Tensor) -> Tensor:
    """The same numbers in the widest type of their device, on it."""
    return values.to(widest_type(values.device))


def computed_wide(compute: Callable[..., Tensor], values: Tensor, *others: Tensor) -> Tensor:
    """What is computed in fp64, on the device of `values`: there, or on the processor and then rounded to fp32.

    Args:
        compute: gets the values in fp64, and the others as they are, all on one device.
        values: what to compute with.
        others: what belongs to them, such as places.
    """
    if has_fp64(values.device):
        return compute(values.double(), *others)
    return compute(widened(values), *(one.cpu() for one in others)).to(torch.float32).to(values.device)


def total(values: Tensor) -> float:
    """The sum in fp64, without a copy of the numbers in it."""
    here = values.detach() if has_fp64(values.device) else values.detach().cpu()
    return float(here.sum(dtype=torch.float64))


def norm(values: Tensor) -> float:
    """The Euclidean norm, summed in fp64 without a copy of the numbers in it."""
    here = values.detach() if has_fp64(values.device) else values.detach().cpu()
    here = here.to(torch.promote_types(here.dtype, torch.float32))
    return float(torch.linalg.vector_norm(here, dtype=torch.float64))
