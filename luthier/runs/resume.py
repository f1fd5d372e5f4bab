"""What a run keeps while it is under way, and how it goes on from there: recipe, results of the base, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date, datetime
from pathlib import Path
from typing import NamedTuple

from luthier import disk
from luthier.errors import LuthierError, Say
from luthier.evaluate.sets import SetResult
from luthier.planning.plan import Plan
from luthier.recipe import Recipe, same_steps
from luthier.results.folder import read_run, write_json
from luthier.training import checkpoint
from luthier.training.loop import Progress

BEFORE, CHECKPOINTS = "before.json", "checkpoints"


class Before(NamedTuple):
    """What was measured of the base."""

    results: Mapping[str, SetResult]
    noise: Mapping[str, float]
    """How far a set's value moved when the base was measured again."""


def save_before(plan: Plan, folder: Path, before: Before) -> None:
    """Keep what was measured of the base, so that a resumed run need not do it again."""
    if plan.engine.world.is_first:
        results = {name: result.as_json() for name, result in before.results.items()}
        write_json(folder / BEFORE, {"results": results, "noise": dict(before.noise)})


def read_before(folder: Path, say: Say) -> Before | None:
    """What was kept of the base; None where nothing was or it cannot be read, and it is measured again."""
    if not (folder / BEFORE).is_file():
        return None
    try:
        kept = json.loads((folder / BEFORE).read_text(encoding="utf-8"))
        results = {name: SetResult.from_json(one) for name, one in kept["results"].items()}
        return Before(results, {name: float(one) for name, one in kept["noise"].items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        say(f"{BEFORE} cannot be read ({type(error).__name__}: {error}): measuring the base again")
        return None


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Keep the recipe beside what it makes."""
    with disk.written(folder / "recipe.yaml") as beside:
        beside.write_text(recipe.as_yaml(), encoding="utf-8")


def day_of(folder: Path) -> date | None:
    """The day on which a run began whose chat template asks for it: its rows must stay what they were. None for other runs."""
    told = (read_run(folder).facts.get("rows") or {}).get("date")
    return None if told is None else datetime.fromisoformat(told).date()


def check_resumable(plan: Plan, folder: Path) -> bool:
    """Whether the recipe cuts steps into other micro-batches than that of the run in the folder; else it must ask for the same.

    Raises:
        LuthierError: the folder holds no run, the run has finished, or it was made by another recipe.
    """
    run = read_run(folder)
    if run.facts.get("status") == "finished":
        raise LuthierError("this run has finished", where=str(folder), mend="start a new one: luthier train RECIPE")
    made_by, before = run.facts.get("recipe_hash"), run.fact("recipe")
    if made_by == plan.recipe.hash():
        return False
    if not same_steps(before, plan.recipe.as_plain()):
        raise LuthierError(
            f"this run was made by another recipe ({made_by}, not {plan.recipe.hash()})",
            where=str(folder),
            mend=f"use {folder / 'recipe.yaml'}",
        )
    return bool((before.get("train") or {}).get("micro_batch_tokens") != plan.recipe.train.micro_batch_tokens)


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
        with disk.explained(folder / "steps.jsonl"):
            (folder / "steps.jsonl").write_text(lines, encoding="utf-8")
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
