"""Writing a run's result for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, Say, silent
from luthier.export import export_gguf, export_model, export_peft
from luthier.results.folder import read_run
from luthier.results.opened import open_run


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
    if target.exists():
        raise LuthierError("this exists already", where=str(target), mend="name another, or remove it")
    if form != "gguf" and weights != "auto":
        raise LuthierError(f"weights `{weights}` are for GGUF files", where="--weights", mend="leave it out, or use --as gguf")
    run = read_run(name, out)
    if form == "model":
        tune, tokenizer = open_run(run, say=say, merged=False, weights_only=weights_only)
        return {"folder": str(target), "as": form, **export_model(tune, tokenizer, target)}
    if form == "gguf":
        tune, tokenizer = open_run(run, say=say, merged=False, weights_only=weights_only)
        return {"file": str(target), "as": form, **export_gguf(tune, tokenizer, target, weights=weights)}
    if form == "peft":
        tune, _ = open_run(run, say=say, merged=False, weights_only=weights_only)
        return {
            "folder": str(target),
            "as": form,
            **export_peft(tune, target, run.fact("model", "name"), fingerprint=run.fact("model", "fingerprint")),
        }
    raise LuthierError(f"`{form}` is no form of export", where="--as", mend="use model, gguf or peft")
