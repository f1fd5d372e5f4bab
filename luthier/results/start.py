"""What a run starts from: a model, or the result of an earlier run, which again started from one of the two."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from luthier.delta import Delta
from luthier.delta.sources import in_words
from luthier.errors import LuthierError, Say, silent
from luthier.models.load import ModelSource, load_model, load_tokenizer, resolve
from luthier.models.parts import map_parts
from luthier.models.quantized import quantize as quantize_blocks
from luthier.models.tokens import extend
from luthier.recipe import Recipe, make_recipe
from luthier.results.folder import FILE, Run, list_runs, read_run
from luthier.rows.template import KEPT, given_template, is_file
from luthier.training.precision import TYPES, pick, pick_device

BESIDE = "adapters.safetensors"
"""What no delta of the weights can hold: the tensors of prompts, prefixes, edits and heads."""
DELTA = "delta.safetensors"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*-\d+")
"""How the names of runs' folders are made: a name and a number."""


class Start(NamedTuple):
    """Where weights come from."""

    source: ModelSource
    """The model that was there first."""
    runs: tuple[Run, ...] = ()
    """Runs whose changes stand in its weights, in order; the last of them is what was named."""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.runs[-1].folder.name if self.runs else self.source.name

    @property
    def origin(self) -> str:
        """In words, for reports."""
        changes = ", then ".join(f"run {run.folder.name}" for run in self.runs)
        return f"{self.source.name}: {self.source.origin}; then {changes}" if self.runs else self.source.origin

    @property
    def base_name(self) -> str:
        """What the weights are called that a change is one of: new rows make another base of a model."""
        added = ", ".join(self.own_tokens)
        return f"{self.name} with the tokens {added}" if added else self.name

    @property
    def own_tokens(self) -> tuple[str, ...]:
        """Tokens that are added on top of what the runs left."""
        return self.source.add_tokens[sum(map(len, _tokens_of(self.runs))) :]


def _tokens_of(runs: Iterable[Run]) -> list[tuple[str, ...]]:
    """The tokens that each run added before it learnt."""
    return [kept_recipe(run).add_tokens for run in runs]


def is_run(name: str, out: str) -> bool:
    """Whether a name is that of a run, in the folder `out` or as a folder of its own."""
    try:
        return (Path(name) / FILE).is_file() or (Path(out) / name / FILE).is_file()
    except (OSError, ValueError):
        # No file can have such a name.
        return False


def _is_model(name: str) -> bool:
    """Whether a folder holds a model as well, such as one that was exported into a run's folder."""
    return (Path(name) / "config.json").is_file()


def source_of(name: str, out: str, say: Say = silent) -> ModelSource:
    """The model that was there first, with all tokens that were added: its tokenizer is a model's or a run's, whatever a run learned.

    Raises:
        LuthierError: there is no such model or run.
    """
    if is_run(name, out) and not _is_model(name):
        recipe = kept_recipe(read_run(name, out))
        return _with_template(start_of(recipe, say).source, recipe)
    return find_start(name, out, say=say).source


def _with_template(source: ModelSource, recipe: Recipe) -> ModelSource:
    """A source whose tokenizer has the chat template that a run gave to it, if it gave one: it is part of the run's result."""
    given = given_template(recipe.rows.chat_template)
    return source if given is None else replace(source, chat_template=given)


def find_start(
    name: str,
    out: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    add_tokens: tuple[str, ...] = (),
    say: Say = silent,
) -> Start:
    """Where the weights of a model or a run's result come from.

    Args:
        name: of a model, or a run's folder or name.
        out: the folder that holds the run folders.
        revision, trust_remote_code: of a model, as in a recipe.
        add_tokens: what is added to it, beside what the runs themselves added.
        say: hears what is being done.

    Raises:
        LuthierError: there is no such model or run, a run has not finished, or what one learned is more than a change of weights.
    """
    runs: list[Run] = []
    while is_run(name, out) and not _is_model(name):
        run = read_run(name, out)
        if any(run.folder.resolve() == one.folder.resolve() for one in runs):
            raise LuthierError("this run starts from itself", where=str(run.folder), fix="name a model")
        if revision is not None:
            raise LuthierError(f"`{name}` is a run, and has no revisions", where="revision", fix="leave it out")
        _check_whole(run)
        runs.append(run)
        recipe = recipe_of(run)
        name, out, revision, trust_remote_code = recipe.model, recipe.out, recipe.revision, recipe.trust_remote_code
    try:
        check_near_runs(name, out)
        source = resolve(name, revision=revision, trust_remote_code=trust_remote_code, say=say)
    except LuthierError as error:
        raise _explained(error, name, out, runs) from error
    begun = tuple(reversed(runs))
    tokens = tuple(token for added in (*_tokens_of(begun), add_tokens) for token in added)
    source = replace(source, add_tokens=tokens)
    for run in begun:
        source = _with_template(source, kept_recipe(run))
    return Start(source, begun)


def _gone(error: LuthierError, name: str, run: Run) -> LuthierError:
    return LuthierError(
        f"{run.folder.name} began with `{name}`, which cannot be had: {error.what}",
        where=str(run.folder),
        fix=f"bring `{name}` back to where it was, or beside this run",
    )


def _explained(error: LuthierError, name: str, out: str, runs: list[Run]) -> LuthierError:
    """What is said where a name stands for nothing: who needs it, and that it may be a run's."""
    if runs:
        return _gone(error, name, runs[-1])
    near = difflib.get_close_matches(name, [run.folder.name for run in list_runs(out)], n=3, cutoff=0.5)
    if not near or error.where != "model" or near[0] in error.fix:
        return error
    meant = " or ".join(f"`{one}`" for one in near)
    return LuthierError(error.what, where=error.where, fix=f"did you mean the run {meant}? {error.fix}")


def start_of(recipe: Recipe, say: Say = silent) -> Start:
    """Where the weights come from that a recipe begins with. Errors are those of `find_start`."""
    return find_start(
        recipe.model,
        recipe.out,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        add_tokens=recipe.add_tokens,
        say=say,
    )


def located(recipe: Recipe) -> Recipe:
    """A recipe in which runs are named by their folders, so that it means the same where runs go elsewhere."""

    def found(name: str | None) -> str | None:
        inside = Path(recipe.out) / (name or "")
        return str(inside) if name and not (Path(name) / FILE).is_file() and is_run(name, recipe.out) else name

    models = {name: found(one) for name, one in recipe.models.items()}
    return recipe.model_copy(update={"model": found(recipe.model), "models": models, "baseline_run": found(recipe.baseline_run)})


def load_start(start: Start, dtype: torch.dtype, *, quantize: str = "none", say: Say = silent) -> PreTrainedModel:
    """The weights that a run begins with, on the processor: the first model's, and the changes of runs on top.

    Args:
        start: where they come from.
        dtype: of the weights.
        quantize: as in a recipe; done last.
        say: is told what takes time.

    Raises:
        LuthierError: a run's change does not belong to the weights below it.
    """
    if not start.runs:
        return load_model(start.source, dtype=dtype, quantize=quantize, say=say)
    deltas = [Delta.load(run.folder / DELTA) for run in start.runs]
    # Each change was made in a type of numbers, and its base has its fingerprint in that.
    types = [next((one for one in TYPES.values() if in_words([one]) == delta.base.dtype), torch.float32) for delta in deltas]
    first = replace(start.source, add_tokens=())
    model = load_model(first, dtype=types[0], say=say)
    tokenizer = load_tokenizer(first)
    below = start.source.name
    for run, added, delta, type_ in zip(start.runs, _tokens_of(start.runs), deltas, types, strict=True):
        model.to(type_)  # type: ignore[arg-type]
        if added:
            extend(model, tokenizer, added)
        try:
            delta.apply(model)
        except LuthierError as error:
            raise LuthierError(
                f"what {run.folder.name} learnt does not fit what {below} is now: {error.what}",
                where=str(run.folder),
                fix=f"bring {below} back as it was when {run.folder.name} was trained, or train that again",
            ) from error
        below = run.folder.name
    model.to(dtype)  # type: ignore[arg-type]
    if start.own_tokens:
        extend(model, tokenizer, start.own_tokens)
    if quantize != "none":
        quantize_blocks(model, map_parts(model), quantize)
    return model


def load_base(recipe: Recipe, say: Say, run: Run | None = None) -> tuple[Start, PreTrainedModel, torch.device]:
    """A recipe's untouched model, still on the processor, where it comes from, and the device it belongs on; of a run, if it is one's."""
    device = pick_device(recipe.train.device)
    try:
        start = start_of(recipe, say)
    except LuthierError as error:
        raise (error if run is None or error.where != "model" else _gone(error, recipe.model, run)) from error
    return start, load_start(start, pick(recipe.train.precision, device)[0], quantize=recipe.quantize), device


def recipe_of(run: Run) -> Recipe:
    """A finished run's recipe."""
    status = run.facts.get("status", "unknown")
    if status != "finished":
        raise LuthierError(
            f"this run has not finished ({status})",
            where=str(run.folder),
            fix="wait for it" if status == "running" else f"luthier train --resume {run.folder}",
        )
    return kept_recipe(run)


def kept_recipe(run: Run) -> Recipe:
    """The recipe that a run keeps. Runs that it names are found beside it, too: they may have been moved together. A file with a chat
    template is the one that the run keeps."""
    recipe = make_recipe(run.fact("recipe"), where=str(run.folder / FILE))
    inside = located(recipe.model_copy(update={"out": str(run.folder.parent)}))
    kept = run.folder / KEPT
    own = {"chat_template": str(kept)} if is_file(recipe.rows.chat_template) and kept.is_file() else {}
    rows = recipe.rows.model_copy(update=own)
    return located(recipe).model_copy(update={"model": inside.model, "models": inside.models, "rows": rows})


def _check_whole(run: Run) -> None:
    """Refuse a run of whose result the weights hold a part alone, or whose weights are codes."""
    if recipe_of(run).quantize != "none":
        raise LuthierError(
            "this run learnt beside quantized weights, which take no change",
            where=str(run.folder),
            fix=f"write what it made as a model first: luthier export {run.folder} FOLDER; then name that folder",
        )
    if not (run.folder / BESIDE).is_file():
        return
    with safe_open(run.folder / BESIDE, "pt") as file:
        slots = sorted({name.split("/")[0].rsplit(".", 1)[0] for name in file.keys()})  # noqa: SIM118
    raise LuthierError(
        f"what this run learnt stands beside the weights ({', '.join(slots)}), and another run cannot begin with it",
        where=str(run.folder),
        fix=f"luthier export {run.folder} FOLDER --weights-only writes its weights alone as a model; then name that folder",
    )


def check_near_runs(name: str, out: str) -> None:
    """Refuse what seems to name a run that is not there, before the hub is asked for a model of this name.

    Raises:
        LuthierError: it is formed like a run's name, and there are runs of names like it.
    """
    near = difflib.get_close_matches(name, [run.folder.name for run in list_runs(out)], n=3, cutoff=0.5)
    if near and _RUN_NAME.fullmatch(name) and not Path(name).exists():
        raise LuthierError(
            f"there is no run `{name}` in `{out}`, and no folder",
            where="model",
            fix=f"did you mean {' or '.join(f'`{one}`' for one in near)}? A model on the hub is named OWNER/NAME",
        )
