"""Writing a run's result for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.errors import Say, silent
from luthier.results.folder import read_run
from luthier.results.written import Asked, write_result


def export(
    name: str,
    target: Path,
    *,
    form: str = "model",
    dtype: str = "auto",
    quantize: str | None = None,
    out: str = "runs",
    say: Say = silent,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Write a run's result for other tools.

    Args:
        name: the run.
        target: what to write; it must not exist.
        form: `model`, a plain Hugging Face folder with everything merged, `gguf`, one file of the same, `ollama`, a folder
            with that file and a Modelfile, or `peft`, a folder with an adapter.
        dtype: of the weights, of a GGUF file's matrices, or of an adapter's tensors: fp32, bf16, fp16, or auto, which keeps
            what was trained.
        quantize: of a GGUF file, also of that for Ollama, its matrices in fewer bits: q8_0, or q2_k to q6_k, for which
            `llama-cpp-python` is needed.
        weights_only: leave out prompts, prefixes and edits, which weights cannot hold.

    Raises:
        LuthierError: the target exists, or the result cannot be held in this form.
    """
    asked = Asked(target, form, dtype, quantize)
    asked.check()
    return write_result(read_run(name, out), asked, say=say, weights_only=weights_only)
