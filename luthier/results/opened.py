"""What a run keeps of its result, and opening it again: deltas in the weights or beside them, prompts, prefixes, edits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from luthier import disk, registry
from luthier.delta import Delta
from luthier.delta.beside import standing
from luthier.errors import LuthierError, Say, silent
from luthier.export.peft import parted
from luthier.kinds import Head, Now, Prefix, Prompt, RepresentationEdit, Tensors, WeightDelta
from luthier.models.load import ModelSource, load_tokenizer
from luthier.models.parts import map_parts
from luthier.models.quantized import holder, quantized
from luthier.recipe import Recipe
from luthier.registry import Part, values_of
from luthier.results.folder import Run, read_run
from luthier.results.start import BESIDE, DELTA, find_start, is_run, kept_recipe, load_base, load_start, recipe_of
from luthier.rows.template import choose_for
from luthier.training.precision import pick, pick_device
from luthier.training.services import RunServices
from luthier.tune import Tune
from luthier.tune.sites import HEAD, Addition

PROMPT_LENGTH = "prompt_length"


def save_result(folder: Path, tune: Tune, delta: Delta) -> None:
    """Keep what a run learned: the delta of the weights, and what stands beside them."""
    delta.save(folder / DELTA)
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
    start = find_start(name, out, say=say)
    model = load_start(start, pick(precision, device)[0]).to(device)  # type: ignore[arg-type]
    return Tune(model, map_parts(model)), load_tokenizer(start.source)


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
    start, model, device = load_base(recipe, say, run)
    delta = Delta.load(run.folder / DELTA)
    merged = merged and not quantized(model)
    tune = Tune(model, map_parts(model), keep_base=not merged)
    if merged:
        delta.apply(model)
    else:
        _put_beside(tune, recipe, delta)
    if not weights_only:
        _attach_stored(tune, recipe, run.folder / BESIDE)
    model.to(device)  # type: ignore[arg-type]
    return tune, _tokenizer(start.source, recipe)


def open_base(run: Run, *, say: Say = silent) -> tuple[Tune, PreTrainedTokenizerBase]:
    """The model a run started from, loaded anew."""
    recipe = kept_recipe(run)
    start, model, device = load_base(recipe, say, run)
    model.to(device)  # type: ignore[arg-type]
    return Tune(model, map_parts(model)), _tokenizer(start.source, recipe)


def _tokenizer(source: ModelSource, recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer, which writes conversations as in the run."""
    tokenizer = load_tokenizer(source)
    choose_for(tokenizer, recipe.rows)
    return tokenizer


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
    weight_deltas = [(slot, value) for slot, value in values.found if isinstance(value, WeightDelta)]
    if values.complete and all(value.pair is not None for _, value in weight_deltas):
        for slot, value in weight_deltas:
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
    kinds = RepresentationEdit | Prefix | Prompt | Head
    values = [(slot, value) for slot, value in _values(recipe).found if isinstance(value, kinds)]
    values = values if stored else [(slot, value) for slot, value in values if isinstance(value, Head)]
    left = {name for name in stored if not any(name.startswith((f"{slot}/", f"{slot}.")) for slot, _ in values)}
    if left:
        slot = sorted(left)[0].split("/")[0].split(".")[0]
        raise LuthierError(
            f"the result holds numbers of `{slot}`, and there is no such technique here",
            where=str(path),
            fix="name the folder of your own techniques in LUTHIER_METHODS; what was given in Python cannot be opened again",
        )
    for slot, value in values:
        if isinstance(value, Head):
            tune.add_head(slot, value, held(f"{slot}/{HEAD}"))
            continue
        if isinstance(value, RepresentationEdit):
            shared = None if value.shared is None else (lambda *_, slot=slot: held(slot))
            value = value._replace(start=lambda place, *_, slot=slot: held(f"{slot}/{place}"), shared=shared)
        elif isinstance(value, Prefix):
            value = value._replace(start=lambda *_, slot=slot: held(slot))
        else:
            value = value._replace(start=lambda *_, slot=slot: held(slot), labels=None, length=length)
        tune.add(slot, value, RunServices(tune, slot, now), {})
