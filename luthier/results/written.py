"""Writing a run's result for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.errors import LuthierError, Say, silent
from luthier.export import export_gguf, export_model, export_peft
from luthier.export.classifier import export_classifier
from luthier.export.embedder import export_embedder
from luthier.results.folder import Run
from luthier.results.opened import open_run
from luthier.results.start import recipe_of, start_of


def check_asked(target: Path, form: str, weights: str) -> None:
    """Refuse what can be refused before a run is read.

    Raises:
        LuthierError: the target exists, there is no such form, or the type of the weights does not go with it.
    """
    if target.exists():
        raise LuthierError("this exists already", where=str(target), fix="name another, or remove it")
    if form not in ("model", "gguf", "peft"):
        raise LuthierError(f"`{form}` is no form of export", where="--as", fix="use model, gguf or peft")
    if form != "gguf" and weights != "auto":
        raise LuthierError(f"weights `{weights}` are for GGUF files", where="--weights", fix="leave it out, or use --as gguf")


def write_result(
    run: Run, target: Path, *, form: str = "model", weights: str = "auto", say: Say = silent, weights_only: bool = False
) -> dict[str, Any]:
    """What `luthier.runs.export.export` does, of a run that is known.

    Raises:
        LuthierError: the target exists, the run has not finished, or its result cannot be held in this form.
    """
    check_asked(target, form, weights)
    recipe = recipe_of(run)
    tune, tokenizer = open_run(run, say=say, merged=False, weights_only=weights_only)
    if tune.head is not None and form != "model":
        raise LuthierError(
            f"`{tune.head[0].slot}` is a head that reads rows, which a {form} result does not hold",
            where="--as",
            fix="use --as model, which writes model and head for transformers or sentence-transformers, or --weights-only, which leaves "
            "it out",
        )
    if form == "model":
        write = export_model
        if tune.head is not None:
            write = export_embedder if tune.head[1].means == "vector" else export_classifier
        return {"folder": str(target), "as": form, **write(tune, tokenizer, target)}
    if form == "gguf":
        return {"file": str(target), "as": form, **export_gguf(tune, tokenizer, target, weights=weights)}
    start = start_of(recipe)
    if start.runs:
        raise LuthierError(
            f"this run began with what {start.name} learnt, and an adapter names a model that others can load",
            where="--as",
            fix=f"use --as model; or export {start.name} as a model, and train on that",
        )
    told = run.fact("model", "fingerprint")
    return {"folder": str(target), "as": form, **export_peft(tune, target, start.source, fingerprint=told)}
