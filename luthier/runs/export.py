"""Writing a run's result for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.errors import Say, silent
from luthier.results.folder import read_run
from luthier.results.written import check_asked, write_result


def export(
    name: str,
    target: Path,
    *,
    form: str = "model",
    weights: str = "auto",
    out: str = "runs",
    say: Say = silent,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Write a run's result for other tools.

    Args:
        name: the run.
        target: what to write; it must not exist.
        form: `model`, a plain Hugging Face folder with everything merged, `gguf`, one file of the same, or `peft`, a
            folder with an adapter.
        weights: the type of a GGUF file's matrices: f32, f16, bf16, q8_0 or auto, which keeps the model's.
        weights_only: leave out prompts, prefixes and edits, which weights cannot hold.

    Raises:
        LuthierError: the target exists, or the result cannot be held in this form.
    """
    check_asked(target, form, weights)
    return write_result(read_run(name, out), target, form=form, weights=weights, say=say, weights_only=weights_only)
