"""What a run keeps of its result, and opening it again: deltas in the weights or beside them, prompts, prefixes, edits."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier import disk, registry
from luthier.delta import Delta
from luthier.delta.beside import standing
from luthier.errors import LuthierError, Say, silent
from luthier.export.peft import parted
from luthier.kinds import Additive, Head, HiddenEdit, Now, Prefix, Prompt, Tensors
from luthier.models.load import ModelSource, load_model, load_tokenizer, resolve
from luthier.models.parts import map_parts
from luthier.models.quantized import holder, quantized
from luthier.recipe import Recipe, make_recipe
from luthier.registry import Part, values_of
from luthier.results.folder import FILE, Run, list_runs, read_run
from luthier.rows.template import choose
from luthier.training.precision import pick, pick_device
from luthier.training.services import RunServices
from luthier.tune import Tune
from luthier.tune.sites import HEAD, Addition

BESIDE = "beside.safetensors"
"""What no delta of the weights can hold: the tensors of prompts, prefixes, edits and heads."""
PROMPT_LENGTH = "prompt_length"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*-\d+")
"""How the names of runs' folders are made: a name and a number."""


def save_result(folder: Path, tune: Tune, delta: Delta) -> None:
    """Keep what a run learnt: the delta of the weights, and what stands beside them."""
    delta.save(folder / "delta.safetensors")
    additions = [owner for owner in tune.owns if isinstance(owner, Addition)]
    held = [*additions, *(one.shared for one in additions)]
    beside = {
        f"{owner.name}.{name}": values.detach().cpu().contiguous()
        for owner in tune.owns
        if owner not in held and (_is_head(tune, owner) or not any(one.form == "free" for one in owner.trained.values()))
        for name, values in owner.masters().items()
        # What places share is held once, by its own name.
        if owner.shared is None or name not in owner.shared.masters()
    }
    if beside:
        with disk.written(folder / BESIDE) as place:
            save_file(beside, place, {PROMPT_LENGTH: str(tune.prompt_length)})


def _is_head(tune: Tune, owner: object) -> bool:
    return tune.head is not None and tune.head[0] is owner


def open_model(
    name: str, *, out: str = "runs", say: Say = silent, precision: str = "auto", weights_only: bool = False
) -> tuple[Tune, PreTrainedTokenizerBase]:
    """A model to use, from a model's name or a run's folder; nothing in it trains.

    Args:
        name: what `model:` takes in a recipe, or a run's folder or name.
        out: the folder that holds the run folders.
        say: hears what is being done.
        precision: as in a recipe.
        weights_only: of a run, the tuned weights without the prompts, prefixes and edits that stand beside them.

    Raises:
        LuthierError: there is no such model or run, or the run has not finished.
    """
    if is_run(name, out):
        return open_run(read_run(name, out), say=say, weights_only=weights_only)
    device = pick_device("auto")
    source = source_of(name, out, say)
    model = load_model(source, dtype=pick(precision, device)[0]).to(device)  # type: ignore[arg-type]
    return Tune(model, map_parts(model)), load_tokenizer(source)


def is_run(name: str, out: str) -> bool:
    """Whether a name is that of a run, in the folder `out` or as a folder of its own."""
    try:
        return (Path(name) / FILE).is_file() or (Path(out) / name / FILE).is_file()
    except (OSError, ValueError):
        # No file can have such a name.
        return False


def source_of(name: str, out: str, say: Say) -> ModelSource:
    """Where the weights of a model come from, or those of the base of a run.

    Raises:
        LuthierError: there is no such model or run.
    """
    if is_run(name, out):
        recipe = make_recipe(read_run(name, out).fact("recipe"))
        return resolve(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, say=say)
    check_no_run(name, out)
    return resolve(name, say=say)


def check_no_run(name: str, out: str) -> None:
    """Refuse what names a run where a model belongs, or seems to, before the hub is asked for a model of this name.

    Raises:
        LuthierError: a run has this name, or it is a run's folder; or it is formed like one and there are runs of names like it.
    """
    if is_run(name, out) and not (Path(name) / "config.json").is_file():
        raise LuthierError(
            f"`{name}` is a run, and a model belongs here",
            where="model",
            mend=f"write what it made as a model first: luthier export {name} FOLDER; then name that folder",
        )
    near = difflib.get_close_matches(name, [run.folder.name for run in list_runs(out)], n=3, cutoff=0.5)
    if near and _RUN_NAME.fullmatch(name) and not Path(name).exists():
        raise LuthierError(
            f"there is no run `{name}` in `{out}`, and no folder",
            where="model",
            mend=f"did you mean {' or '.join(f'`{one}`' for one in near)}? A model on the hub is named OWNER/NAME",
        )


def open_run(
    run: Run | str | Path, *, out: str = "runs", say: Say = silent, merged: bool = True, weights_only: bool = False
) -> tuple[Tune, PreTrainedTokenizerBase]:
    """A run's tuned model: its base, with the delta applied and the rest attached.

    Args:
        run: a finished run, its folder, or its name.
        out: the folder that holds the run folders.
        say: hears what is being done.
        merged: put low-rank deltas into the weights; False attaches them beside, as in training. Quantized weights take none, so
            beside them they stand in any case.
        weights_only: leave out prompts, prefixes and edits of hidden states.

    Raises:
        LuthierError: there is no such run, it has not finished, or its result cannot be read.
    """
    run = run if isinstance(run, Run) else read_run(run, out)
    recipe = recipe_of(run)
    source, model, device = load_base(recipe, say)
    delta = Delta.load(run.folder / "delta.safetensors")
    merged = merged and not quantized(model)
    tune = Tune(model, map_parts(model), keep_base=not merged)
    if merged:
        delta.apply(model)
    else:
        _put_beside(tune, recipe, delta)
    if not weights_only:
        _attach_stored(tune, recipe, run.folder / BESIDE)
    model.to(device)  # type: ignore[arg-type]
    return tune, _tokenizer(source, recipe)


def open_base(run: Run, *, say: Say = silent) -> tuple[Tune, PreTrainedTokenizerBase]:
    """The model a run started from, loaded anew."""
    recipe = make_recipe(run.fact("recipe"))
    source, model, device = load_base(recipe, say)
    model.to(device)  # type: ignore[arg-type]
    return Tune(model, map_parts(model)), _tokenizer(source, recipe)


def _tokenizer(source: ModelSource, recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer, which writes conversations as in the run."""
    tokenizer = load_tokenizer(source)
    choose(tokenizer, recipe.rows.template, recipe.rows.template_options)
    return tokenizer


def recipe_of(run: Run) -> Recipe:
    """A finished run's recipe."""
    status = run.facts.get("status", "unknown")
    if status != "finished":
        raise LuthierError(
            f"this run has not finished ({status})",
            where=str(run.folder),
            mend="wait for it" if status == "running" else f"luthier train --resume {run.folder}",
        )
    return make_recipe(run.fact("recipe"), where=str(run.folder / FILE))


def load_base(recipe: Recipe, say: Say) -> tuple[ModelSource, PreTrainedModel, torch.device]:
    """A recipe's untouched model, still on the processor, and the device it belongs on."""
    device = pick_device(recipe.train.device)
    source = resolve(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, say=say)
    model = load_model(source, dtype=pick(recipe.train.precision, device)[0], quantize=recipe.quantize)
    return source, model, device


class _Values(NamedTuple):
    """What a recipe is made of, by slot."""

    found: list[tuple[str, Any]]
    complete: bool
    """Everything could be read back. Most of a run plays no part in its result, such as a loss that was given in Python."""


def _values(recipe: Recipe) -> _Values:
    parts: dict[str, list[Part]] = {name: [] for name in registry.KEYS}
    complete = True
    for name, key in registry.KEYS.items():
        specs = key.of(recipe)
        for spec in specs if isinstance(specs, list) else [specs]:
            try:
                parts[name] += registry.make_all(spec, name)
            except LuthierError:
                complete = False
    return _Values(values_of(parts), complete)


def _put_beside(tune: Tune, recipe: Recipe, delta: Delta) -> None:
    """Let low-rank deltas stand beside the weights as in training."""
    now = Now(seed=recipe.seed)
    values = _values(recipe)
    additives = [(slot, value) for slot, value in values.found if isinstance(value, Additive)]
    if values.complete and all(value.pair is not None for _, value in additives):
        for slot, value in additives:
            tune.add(slot, value, RunServices(tune, slot, now), {})
        delta.restore(tune)
        return
    # Starts may need rows that are gone: the factors that were stored are all that is needed.
    inside, beside = parted(delta, tune.parts)
    frozen = {name: forms for name, forms in inside.changes.items() if holder(tune.model, name) is not None}
    replace(inside, changes={name: forms for name, forms in inside.changes.items() if name not in frozen}).restore(tune)
    if frozen:
        tune.add("wholes", standing(frozen, tune.parts), RunServices(tune, "wholes", now), {})
    if beside is not None:
        tune.add("delta", beside, RunServices(tune, "delta", now), {})


def _attach_stored(tune: Tune, recipe: Recipe, path: Path) -> None:
    """Let prompts, prefixes, edits and heads stand beside the weights, as they were stored; a head may have no numbers of its own."""
    stored: Tensors = {}
    length = 0
    if path.is_file():
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            length = int((file.metadata() or {}).get(PROMPT_LENGTH, 0))

    def held(owner: str) -> Tensors:
        found = {name.removeprefix(f"{owner}."): values for name, values in stored.items() if name.startswith(f"{owner}.")}
        return {name: values for name, values in found.items() if name.isidentifier()}

    now = Now(seed=recipe.seed)
    kinds = HiddenEdit | Prefix | Prompt | Head
    values = [(slot, value) for slot, value in _values(recipe).found if isinstance(value, kinds)]
    values = values if stored else [(slot, value) for slot, value in values if isinstance(value, Head)]
    left = {name for name in stored if not any(name.startswith((f"{slot}/", f"{slot}.")) for slot, _ in values)}
    if left:
        slot = sorted(left)[0].split("/")[0].split(".")[0]
        raise LuthierError(
            f"the result holds numbers of `{slot}`, and there is no such technique here",
            where=str(path),
            mend="name the folder of your own techniques in LUTHIER_METHODS; what was given in Python cannot be opened again",
        )
    for slot, value in values:
        if isinstance(value, Head):
            tune.add_head(slot, value, held(f"{slot}/{HEAD}"))
            continue
        if isinstance(value, HiddenEdit):
            shared = None if value.shared is None else (lambda *_, slot=slot: held(slot))
            value = value._replace(start=lambda place, *_, slot=slot: held(f"{slot}/{place}"), shared=shared)
        elif isinstance(value, Prefix):
            value = value._replace(start=lambda *_, slot=slot: held(slot))
        else:
            value = value._replace(start=lambda *_, slot=slot: held(slot), labels=None, length=length)
        tune.add(slot, value, RunServices(tune, slot, now), {})
