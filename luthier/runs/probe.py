"""Looking inside: what tuning changed in a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from luthier import registry
from luthier.delta import Delta
from luthier.delta.sources import in_words
from luthier.delta.weights import Weights, of_delta, of_models
from luthier.errors import LuthierError, Say, silent
from luthier.export.peft import load_peft
from luthier.export.peft_adapter import CONFIG
from luthier.kinds import Finding, Now
from luthier.models.fingerprint import fingerprint
from luthier.models.parts import map_parts
from luthier.models.quantized import expand
from luthier.results.folder import Run, read_run
from luthier.results.opened import open_run
from luthier.results.start import BESIDE, find_start, is_run, load_base, load_start, recipe_of, start_of
from luthier.training.precision import TYPES, pick
from luthier.training.services import RunServices
from luthier.tune import Tune


def probe(
    name: str, base: str, tuned: str = "", *, out: str = "runs", precision: str = "fp32", say: Say = silent, **options: Any
) -> Finding:
    """Look at what tuning changed inside a model.

    Args:
        name: the probe's, e.g. `intruder_dimensions`.
        base: a model's name, or a run's folder or name. Where it stands alone, a run, which is compared with its own base.
        tuned: a run's folder or name, a model's name, or the folder of a LoRA adapter of PEFT.
        out: the folder that holds the run folders.
        precision: of models: fp32 holds every number of their files. A run brings its own.
        say: hears what is being done.
        options: of the probe.

    Raises:
        LuthierError: there is no such probe, option, model or run, or the two are of different architectures or shapes.
    """
    return look_inside({name: options}, base, tuned, out=out, precision=precision, say=say)


def look_inside(
    spec: Mapping[str, Mapping[str, Any]],
    base: str,
    tuned: str = "",
    *,
    out: str = "runs",
    precision: str = "fp32",
    say: Say = silent,
) -> Finding:
    """`probe`, with the probe as a recipe would spell it: `{name: {option: value}}`."""
    named = {name.replace("-", "_"): options for name, options in spec.items()}
    part = registry.make(named, ("probe",), where="luthier probe")
    weights = compare_weights(base, tuned, out=out, precision=precision, say=say)
    say(f"{part.name}: looking at {len(weights.changed)} changed places")
    finding: Finding = part.values[0].look(weights)
    return finding._replace(notes=[*finding.notes, *_beside_notes(tuned or base, out)])


def compare_weights(base: str, tuned: str = "", *, out: str = "runs", precision: str = "fp32", say: Say = silent) -> Weights:
    """What a probe gets. Runs and adapters need the base and their change; only other models are loaded twice.

    Args and errors are those of `probe`.
    """
    # On other devices singular values are computed on the processor anyway.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not tuned:
        if not is_run(base, out):
            raise LuthierError(f"`{base}` is no run, so its base is not known", where="luthier probe", fix="give BASE and TUNED")
        base, tuned = "", base
    if is_run(tuned, out):
        found = _beside_base(read_run(tuned, out), base, out, say)
        if found is not None:
            model, delta = found
            return Weights(model, map_parts(model), of_delta(delta), device=device)
    model = _whole_model(base, out, precision, say)
    parts = map_parts(model)
    if (Path(tuned) / CONFIG).is_file():
        tune = Tune(model, parts)
        tune.add("adapter", load_peft(tuned, tune), RunServices(tune, "adapter", Now()), {})
        return Weights(model, parts, of_delta(Delta.of(tune)), device=device)
    other = _whole_model(tuned, out, precision, say)
    return Weights(model, parts, of_models(model, parts, other, map_parts(other)), device=device)


def _beside_base(run: Run, base: str, out: str, say: Say) -> tuple[PreTrainedModel, Delta] | None:
    """A run's base and its delta; None where `base` names another model than the run trained."""
    recipe = recipe_of(run)
    if base and is_run(base, out):
        return None
    # The run's own base has the tokens that it added.
    start = start_of(recipe, say) if base in ("", recipe.model) else find_start(base, out, say=say)
    delta = Delta.load(run.folder / "delta.safetensors")
    dtype = next((one for one in TYPES.values() if in_words([one]) == delta.base.dtype), torch.float32)
    model = load_start(start, dtype, quantize=recipe.quantize)
    if fingerprint(model) == delta.base.fingerprint:
        expand(model, dtype)
        return model, delta
    if base:
        return None
    raise LuthierError(
        "the base of this run is no longer the model that it trained",
        where=recipe.model,
        fix="name the base itself: luthier probe NAME BASE RUN",
    )


def _whole_model(name: str, out: str, precision: str, say: Say) -> PreTrainedModel:
    """A model, or a run's model with its delta in the weights."""
    if is_run(name, out):
        run = read_run(name, out)
        recipe = recipe_of(run)
        if recipe.quantize == "none":
            return cast(PreTrainedModel, open_run(run, say=say)[0].model)
        _, model, _ = load_base(recipe, say)
        # Quantized weights take no change, dense ones of the same numbers do.
        expand(model, model.dtype)
        Delta.load(run.folder / "delta.safetensors").apply(model, force=True)
        return model
    return load_start(find_start(name, out, say=say), pick(precision, torch.device("cpu"))[0])


def _beside_notes(tuned: str, out: str) -> list[str]:
    if is_run(tuned, out) and (read_run(tuned, out).folder / BESIDE).is_file():
        return ["prompts, prefixes or edits of hidden states stand beside the weights and were not compared"]
    return []
