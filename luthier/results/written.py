"""Writing a run's result for other tools."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from luthier.errors import LuthierError, Say, silent
from luthier.export import export_gguf, export_model, export_peft
from luthier.export.classifier import export_classifier
from luthier.export.embedder import export_embedder
from luthier.export.gguf_quantize import BITS, library
from luthier.export.model import dtype_of
from luthier.export.ollama import export_ollama
from luthier.export.peft_base import Base, base_of
from luthier.models.classes import auto_class
from luthier.report.card import FILE, Published, Use, model_card
from luthier.results.folder import Run
from luthier.results.opened import open_run
from luthier.results.start import recipe_of, start_of
from luthier.tune import Tune

FORMS = ("model", "gguf", "ollama", "peft")
GGUF = ("gguf", "ollama")
"""Forms that are, or hold, a GGUF file."""
DTYPES: Mapping[str, torch.dtype | None] = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
QUANTIZED = ("q8_0", *BITS)
"""Types of fewer bits that a GGUF file may have; all but the first are made by llama.cpp's own quantizer."""
_GGUF = {"auto": "auto", "fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_TEXT = "text-generation"
_OLLAMA = Use("gguf", _TEXT, "ollama create FOLDER -f FOLDER/Modelfile\nollama run FOLDER", "sh")
_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'


class Asked(NamedTuple):
    """What is to be written."""

    target: Path
    form: str = "model"
    dtype: str = "auto"
    quantize: str | None = None
    called: str = ""
    """What the card calls it; empty for the folder's name."""
    published: Published = Published()

    def check(self) -> None:
        """Refuse what can be refused before a run is read.

        Raises:
            LuthierError: the target exists, or there is no such form, type or quantization, or they do not go together.
        """
        if self.target.exists():
            raise LuthierError("this exists already", where=str(self.target), fix="name another, or remove it")
        if self.form not in FORMS:
            raise LuthierError(f"`{self.form}` is no form of export", where="--as", fix=f"use {', '.join(FORMS)}")
        if self.dtype not in DTYPES:
            fix = f"use {', '.join(DTYPES)}"
            raise LuthierError(f"there is no dtype `{self.dtype}`", where="--dtype", fix=fix)
        self.published.check()
        if self.quantize is None:
            return
        if self.form not in GGUF:
            fix = f"leave it out, or use --as {' or '.join(GGUF)}"
            raise LuthierError("quantized results are GGUF files", where="--quantize", fix=fix)
        if self.quantize not in QUANTIZED:
            fix = f"use {', '.join(QUANTIZED)}; llama.cpp makes others from a file without --quantize"
            raise LuthierError(f"`{self.quantize}` is no quantization that is written here", where="--quantize", fix=fix)
        if self.dtype != "auto":
            raise LuthierError("a quantized file has no dtype of its own", where="--dtype", fix="leave it out")
        if self.quantize in BITS:
            library()


def write_result(run: Run, asked: Asked, *, say: Say = silent, weights_only: bool = False) -> dict[str, Any]:
    """What `luthier.runs.export.export` does, of a run that is known.

    Raises:
        LuthierError: the target exists, the run has not finished, or its result cannot be held in this form.
    """
    asked.check()
    target, form = asked.target, asked.form
    start = start_of(recipe_of(run))
    tune, tokenizer = open_run(run, say=say, merged=False, weights_only=weights_only)
    if tune.head is not None and form != "model":
        raise LuthierError(
            f"`{tune.head[0].slot}` is a head that reads rows, which a {form} result does not hold",
            where="--as",
            fix="use --as model, which writes model and head for transformers or sentence-transformers, or --weights-only, which leaves "
            "it out",
        )
    weights = asked.quantize or _GGUF[asked.dtype]
    if form == "gguf":
        return {"file": str(target), "as": form, **export_gguf(tune, tokenizer, target, weights=weights)}
    dtype, base = DTYPES[asked.dtype], base_of(start.source)
    card = partial(model_card, run.facts, base=base.hub, folder=asked.called or target.name, published=asked.published)
    facts: dict[str, Any] = {"folder": str(target), "as": form}
    if form == "ollama":
        texts = {FILE: card(_OLLAMA)}
        return {**facts, **export_ollama(tune, tokenizer, target, weights=weights, texts=texts)}
    if form == "model":
        write = export_model
        if tune.head is not None:
            write = export_embedder if tune.head[1].means == "vector" else export_classifier
        return {**facts, **write(tune, tokenizer, target, dtype=dtype, texts={FILE: card(_use(tune))})}
    if start.source.add_tokens:
        listed = ", ".join(f"`{token}`" for token in start.source.add_tokens)
        raise LuthierError(
            f"the model has rows for {listed} which its base has not, and an adapter stands beside the base as it is",
            where="--as",
            fix="use --as model, which holds rows and tokenizer",
        )
    if start.runs:
        raise LuthierError(
            f"this run began with what {start.name} learnt, and an adapter names a model that others can load",
            where="--as",
            fix=f"use --as model; or export {start.name} as a model, and train on that",
        )
    texts = {FILE: card(_adapter(tune), note=_about(base, tune))}
    told = run.fact("model", "fingerprint")
    written = export_peft(tune, target, start.source, fingerprint=told, tokenizer=tokenizer, dtype=dtype, texts=texts)
    return {**facts, **written}


def _use(tune: Tune) -> Use:
    """How a folder with everything merged is loaded."""
    if tune.head is not None and tune.head[1].means == "vector":
        code = 'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("FOLDER")'
        return Use("sentence-transformers", "sentence-similarity", code)
    name, task = (
        auto_class(tune.model.config, causal=tune.parts.causal).__name__,
        _TEXT if tune.parts.causal else "feature-extraction",
    )
    if tune.head is not None:
        words = tune.head[1].pool == "words"
        name = "AutoModelForTokenClassification" if words else "AutoModelForSequenceClassification"
        task = "token-classification" if words else "text-classification"
    code = f'from transformers import AutoTokenizer, {name}\n\nmodel = {name}.from_pretrained("FOLDER", dtype="auto")\n{_TOKENIZER}'
    return Use("transformers", task, code)


def _adapter(tune: Tune) -> Use:
    """How an adapter is loaded beside its base."""
    name = auto_class(tune.model.config, causal=tune.parts.causal).__name__
    code = (
        f"import torch\nfrom peft import PeftModel\nfrom transformers import AutoTokenizer, {name}\n\n"
        f'base = {name}.from_pretrained("BASE", dtype=torch.{dtype_of(tune.model)})\n'
        f'model = PeftModel.from_pretrained(base, "FOLDER")\n{_TOKENIZER}'
    )
    return Use("peft", _TEXT if tune.parts.causal else "feature-extraction", code)


def _about(base: Base, tune: Tune) -> str:
    lost = "" if base.hub else "The base is on no hub, so its folder has to be named by whoever loads this. "
    return (
        f"{lost}The adapter was trained beside the base in {dtype_of(tune.model)}; beside it in another type, answers may differ."
    )
