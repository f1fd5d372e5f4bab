"""What a run keeps while it is under way, and how it goes on from there: recipe, results of the base, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from luthier import disk
from luthier.errors import LuthierError, Say
from luthier.evaluate.sets import SetResult
from luthier.planning.plan import Plan
from luthier.recipe import GIVEN_IN_PYTHON, Recipe, differences, flat
from luthier.results.folder import STEPS, Run, read_run, write_json
from luthier.rows.template import KEPT, is_file
from luthier.runs.inputs import check_inputs
from luthier.training import checkpoint
from luthier.training.loop import Progress

BEFORE, CHECKPOINTS, RECIPE = "before.json", "checkpoints", "recipe.yaml"


class Before(NamedTuple):
    """What was measured of the base."""

    results: Mapping[str, SetResult]
    noise: Mapping[str, float]
    """How far a set's value moved when the base was measured again."""


def save_before(plan: Plan, folder: Path, before: Before) -> None:
    """Keep what was measured of the base, so that a resumed run need not do it again."""
    if plan.engine.world.is_first:
        results = {name: result.as_json() for name, result in before.results.items()}
        write_json(folder / BEFORE, {"results": results, "repeat_baseline": dict(before.noise)})


def read_before(folder: Path, say: Say) -> Before | None:
    """What was kept of the base; None where nothing was or it cannot be read, and it is measured again."""
    if not (folder / BEFORE).is_file():
        return None
    try:
        kept = json.loads((folder / BEFORE).read_text(encoding="utf-8"))
        results = {name: SetResult.from_json(one) for name, one in kept["results"].items()}
        return Before(results, {name: float(one) for name, one in kept["repeat_baseline"].items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        say(f"{BEFORE} cannot be read ({type(error).__name__}: {error}): measuring the base again")
        return None


def write_recipe(folder: Path, recipe: Recipe, template: str | None = None) -> None:
    """Keep the recipe beside what it makes, and the chat template, where that is a file of its own."""
    if is_file(recipe.rows.chat_template) and template is not None:
        with disk.written(folder / KEPT) as beside:
            beside.write_text(template, encoding="utf-8")
    with disk.written(folder / RECIPE) as beside:
        beside.write_text(recipe.as_yaml(), encoding="utf-8")


def day_of(folder: Path) -> date | None:
    """The day on which a run began whose chat template asks for it: its rows must stay what they were. None for other runs."""
    told = (read_run(folder).facts.get("rows") or {}).get("date")
    return None if told is None else datetime.fromisoformat(told).date()


def recipe_file(run: Run) -> Path:
    """The recipe that a run keeps, to go on with.

    Raises:
        LuthierError: it is not there, or some of it was given in Python and cannot be read back.
    """
    path = run.folder / RECIPE
    if not path.is_file():
        raise LuthierError(f"this run's {RECIPE} is gone", where=str(run.folder), fix=f"luthier train RECIPE --resume {run.folder}")
    given = sorted(key for key, value in flat(run.facts.get("recipe") or {}).items() if GIVEN_IN_PYTHON in str(value))
    if given:
        raise LuthierError(
            f"what this run holds under {', '.join(f'`{key}`' for key in given)} was given in Python, and no file can hold it",
            where=str(path),
            fix=f"go on in Python, with the same values: luthier.train(recipe, resume={str(run.folder)!r})",
        )
    return path


def check_resumable(plan: Plan, folder: Path, inputs: Mapping[str, str], say: Say) -> bool:
    """Whether the recipe cuts steps into other micro-batches than that of the run in the folder; else it must ask for the same, of the
    same rows and the same base.

    Args:
        plan: the run, freshly made.
        folder: where it began.
        inputs: what it reads now.
        say: hears what cannot be checked.

    Raises:
        LuthierError: the folder holds no run, the run has finished, it was made by another recipe, or what it reads has changed.
    """
    run = read_run(folder)
    if run.facts.get("status") == "finished":
        raise LuthierError(
            "this run has finished, and a finished run takes no more steps",
            where=str(folder),
            fix=f"start a new one: luthier train {folder / RECIPE}, with more train.epochs if it shall train longer",
        )
    before, now = run.fact("recipe"), plan.recipe.as_plain()
    if run.facts.get("recipe_hash") != plan.recipe.hash():
        _check_steps(before, now, folder)
    check_inputs(inputs, run, say)
    return bool((before.get("train") or {}).get("micro_batch_tokens") != plan.recipe.train.micro_batch_tokens)


def _check_steps(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    changed = differences(before, now)
    if not changed:
        return
    told = [f"{key}: {_written(old)}, now {_written(new)}" for key, old, new in changed]
    raise LuthierError(
        f"this run was made by another recipe: {'; '.join(told)}",
        where=str(folder),
        fix="set these keys back to go on with this run, or begin a new run with the changed recipe: luthier train RECIPE",
    )


def _written(value: object) -> str:
    """A value as a recipe writes it."""
    return "not set" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def continue_from(plan: Plan, folder: Path, say: Say, *, cut_anew: bool) -> Progress:
    """Clear away what a kill left half-done, and bring the run back to its newest readable checkpoint.

    Args:
        plan: the run, freshly made.
        folder: where it began.
        say: hears where it goes on, and of checkpoints that cannot be read.
        cut_anew: its recipe cuts steps into other micro-batches from here on.

    Raises:
        LuthierError: there are checkpoints, and none can be read.
    """
    world = plan.engine.world
    if world.is_first:
        disk.sweep(folder)
        disk.sweep(folder / CHECKPOINTS)
    world.wait()
    newest = checkpoint.latest(folder / CHECKPOINTS, say)
    progress = Progress()
    if newest is None:
        say("there is no checkpoint yet: starting from the first step")
    else:
        facts = checkpoint.restore(newest, plan.engine)
        progress = Progress.resumed(facts["progress"])
        say(f"resuming from {newest.name}")
        if world.is_first:
            # Where the kill came between a checkpoint and the deletion of an older one.
            checkpoint.prune(folder / CHECKPOINTS, plan.recipe.train.keep_checkpoints)
    if cut_anew:
        progress.micro_batch_tokens = plan.feed.micro_batch_tokens
        progress.notes.append(
            f"micro-batches of at most {plan.feed.micro_batch_tokens} tokens from step {progress.step + 1} on, as asked for when the "
            "run was resumed: the same steps, up to rounding"
        )
        say(progress.notes[-1])
    # Steps taken after the checkpoint are taken again.
    lines = "".join(json.dumps(line) + "\n" for line in progress.history)
    if world.is_first:
        with disk.explained(folder / STEPS):
            (folder / STEPS).write_text(lines, encoding="utf-8")
    return progress


def save_checkpoint(plan: Plan, folder: Path, progress: Progress, say: Say) -> None:
    """Write a checkpoint and drop the oldest.

    One that nobody asked for guards what was trained until the result is saved; where there is no room for it, the run goes on.
    """
    try:
        _save_checkpoint(plan, folder, progress)
    except LuthierError as error:
        if progress.interrupted or plan.recipe.train.save_every is not None:
            raise
        say(f"going on without a checkpoint of what was trained: {error.what}")


def _save_checkpoint(plan: Plan, folder: Path, progress: Progress) -> None:
    root = folder / CHECKPOINTS
    facts = {"progress": asdict(progress), "recipe_hash": plan.recipe.hash(), "steps": plan.clock.steps}
    # A run that has taken all its steps needs no moments any more; those of a large model would take long to write.
    goes_on = progress.interrupted or plan.recipe.train.save_every is not None
    checkpoint.save(root / f"step-{progress.step}", plan.engine, facts, moments=goes_on)
    if plan.engine.world.is_first:
        checkpoint.prune(root, plan.recipe.train.keep_checkpoints)
