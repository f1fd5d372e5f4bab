"""Weights of a GGUF file in few bits, by llama.cpp's own quantizer, which `llama-cpp-python` carries."""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError, printable

BITS = {
    "q2_k": 2,
    "q3_k_s": 3,
    "q3_k_m": 3,
    "q3_k_l": 3,
    "q4_0": 4,
    "q4_1": 4,
    "q4_k_s": 4,
    "q4_k_m": 4,
    "q5_0": 5,
    "q5_1": 5,
    "q5_k_s": 5,
    "q5_k_m": 5,
    "q6_k": 6,
}
"""What llama.cpp can make without a sample of text, and the fewest bits that a matrix gets; `_s`, `_m` and `_l` give some of them more."""


_MOST = 0.7
"""The largest share of its own size by which a tensor may be off: halfway to another of the same size."""


def library() -> Any:
    """`llama_cpp`.

    Raises:
        LuthierError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("llama_cpp")
    # Its compiled part may be missing or of another machine, which it tells in several ways.
    except (ImportError, OSError, RuntimeError) as error:
        raise LuthierError(
            f"llama.cpp's quantizer cannot be loaded: {error}",
            where="--quantize",
            fix="pip install llama-cpp-python, which needs a C++ compiler; or use q8_0, which needs nothing",
        ) from error


def quantize(source: Path, target: Path, name: str) -> None:
    """Write a GGUF file in fewer bits.

    Args:
        source: a file with matrices of f32, f16 or bf16.
        target: the file to write.
        name: one of `BITS`.

    Raises:
        LuthierError: llama.cpp's quantizer is not there, or refuses.
    """
    llama: Any = library()
    options = llama.llama_model_quantize_default_params()
    options.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
    options.nthread = torch.get_num_threads()
    lines: list[str] = []
    # What calls back must live as long as the library may call it.
    hear = llama.llama_log_callback(lambda level, text, _: lines.append(text.decode("utf-8", "replace")))
    llama.llama_log_set(hear, None)
    try:
        code = llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(options))
    finally:
        llama.llama_log_set(llama._logger.llama_log_callback, None)
    if code or not target.is_file():
        said = printable(next((line for line in reversed(lines) if line.strip()), "it does not say why")).strip()
        raise LuthierError(
            f"llama.cpp's quantizer refuses this model: {said}", where=f"--quantize {name}", fix="try another, such as q8_0"
        )


def rounds_to(values: Tensor, found: Tensor, name: str) -> bool:
    """Whether a tensor is near enough to be what so many bits make of it, by the root mean square of its errors.

    Weights of SmolLM2-135M, and normal ones, lose less than half of what is allowed. Numbers in another order, of another tensor or of
    another sign differ by more than they are large.
    """
    if values.shape != found.shape:
        return False
    exact, read = machine.widened(values).cpu(), machine.widened(found).cpu()
    share = min(_MOST, 2.0 ** (2 - BITS[name]))
    return bool((exact - read).square().mean().sqrt() <= share * exact.square().mean().sqrt())
