"""The whole story on one page: recipe, plan, measure, train, measure again, compare, keep, report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from luthier import __version__, machine
from luthier.delta import Delta, summary
from luthier.errors import LuthierError
from luthier.evaluate.compare import base_noise, compare, share_kept
from luthier.evaluate.overlap import overlap
from luthier.evaluate.sets import EvalSet, SetResult, measure
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_model
from luthier.plan import Plan, Say, make_plan
from luthier.recipe import Recipe, make_recipe, read_recipe
from luthier.report import write_report
from luthier.run import FILE, Run, new_folder, read_run, write_json
from luthier.training import checkpoint
from luthier.training.engine import StepResult
from luthier.training.loop import Plans, Progress
from luthier.training.loop import train as run_loop
from luthier.training.world import World
from luthier.use import evaluation_sets, save_result

Tell = Callable[[Plan, Progress, StepResult], None]
BEFORE = "before.json"


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    resume: str | Path | None = None,
    say: Say = lambda text: None,
    tell: Tell = lambda plan, progress, result: None,
    command: str = "",
    **keys: Any,
) -> Run:
    """Fine-tune a model as a recipe says, and show what changed.

    Args:
        recipe: a recipe, its data, or its file.
        resume: a run's folder to continue; the result is the same, bit for bit, as without the interruption.
        say: hears what is being done.
        tell: hears of every step.
        command: what a user would type to do this again.
        keys: a recipe's keys, instead of a recipe; techniques may be names, mappings or parts made by `luthier.part`.

    Returns:
        The run, with the tuned model in memory and everything else in its folder.

    Raises:
        LuthierError: a mistake in the recipe, the rows or the model, found before anything trains; or numbers that are not
            finite, with the rows that made them.
    """
    recipe = as_recipe(recipe if recipe is not None else keys)
    began = time.perf_counter()
    if World.current().size > 1:
        raise LuthierError(
            "whole runs on several processes are not there yet",
            where="WORLD_SIZE",
            mend="use one process; the step itself (luthier.training) runs on several",
        )
    plan = make_plan(recipe, say)
    sets = evaluation_sets(recipe)
    folder = Path(resume) if resume is not None else new_folder(recipe.out, recipe.name)
    facts = first_facts(plan, folder, command, sets)
    progress = Progress()
    if resume is not None:
        progress, before = continue_from(plan, folder, sets, say)
        write_json(folder / FILE, facts)
    else:
        (folder / "recipe.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
        write_json(folder / FILE, facts)
        before = measure_base(plan, sets, say)
        save_before(folder, before)
    noise = base_noise(plan.engine.tune, plan.tokenizer, sets, before, say=say) if sets and recipe.noise and not resume else {}

    machine.reset_peak(plan.device)
    say(f"training: {plan.clock.steps} steps")
    try:
        progress = run_loop(
            plan.engine,
            plan.feed,
            plan.clock,
            Plans(recipe.train.save_every, recipe.train.evaluate_every, recipe.train.patience, recipe.train.best),
            progress,
            evaluate=mid_run(plan, sets) if sets else None,
            save=lambda at: save_checkpoint(plan, folder, at),
            tell=lambda at, result: _step_done(plan, folder, at, result, tell),
        )
    except LuthierError as error:
        finish(folder, {**facts, "status": "failed", "history": progress.history, "warnings": [error.what]}, say)
        raise
    facts |= cost(plan, progress)
    if progress.interrupted:
        facts["status"] = "stopped"
        finish(folder, facts, say)
        say(f"stopped after step {progress.step}; `luthier train --resume {folder}` goes on")
        return Run(folder, facts, plan.model, plan.tokenizer, plan.engine.tune)

    after = measure(plan.engine.tune, plan.tokenizer, sets, say=say) if sets else {}
    facts |= what_changed(plan, before, after, noise)
    facts["delta"] = keep_what_changed(plan, folder, say)
    facts |= {"status": "finished", "total_seconds": time.perf_counter() - began}
    finish(folder, facts, say)
    return Run(folder, facts, plan.model, plan.tokenizer, plan.engine.tune)


def finish(folder: Path, facts: Mapping[str, Any], say: Say) -> None:
    """Write the facts and the page, however the run ended."""
    write_json(folder / FILE, facts)
    write_report(facts, folder / "report.html")
    say(f"report: {folder / 'report.html'}")


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe from whatever names one."""
    if isinstance(recipe, Recipe):
        return recipe
    return make_recipe(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe)


def first_facts(plan: Plan, folder: Path, command: str, sets: list[EvalSet]) -> dict[str, Any]:
    """What is known before training."""
    recipe = plan.recipe
    return {
        "luthier": __version__,
        "name": recipe.name,
        "run": str(folder),
        "status": "running",
        "command": command,
        "recipe": recipe.as_plain(),
        "recipe_text": recipe.as_yaml(),
        "recipe_hash": recipe.hash(),
        "seed": recipe.seed,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": machine.describe(plan.device, plan.dtype),
        "model": {
            "name": plan.source.name,
            "origin": plan.source.origin,
            "architecture": plan.parts.architecture,
            "parameters": plan.total_numbers,
            "fingerprint": plan.fingerprint,
        },
        "rows": {
            "files": plan.sources,
            "rows": len(plan.rows.rows),
            "tokens": plan.rows.tokens,
            "supervised_tokens": plan.rows.supervised_tokens,
            "truncated": plan.rows.truncated,
            "dropped": [list(pair) for pair in plan.rows.dropped],
            "skipped": [list(bad) for bad in plan.skipped],
            "padding_share": plan.feed.padding(),
            "overlap": {one.name: len(overlap(plan.raw, one.rows)) for one in sets},
        },
        "plan": plan.lines(),
        "tune": ", ".join(part.name for part in plan.chosen["tune"]),
        "trained_numbers": plan.trained_numbers,
        "total_numbers": plan.total_numbers,
        "warnings": plan.warnings(),
    }


def measure_base(plan: Plan, sets: list[EvalSet], say: Say) -> dict[str, SetResult]:
    """The evaluation sets on the untouched model."""
    if not sets:
        return {}
    say("measuring the base: " + ", ".join(one.name for one in sets))
    with plan.engine.tune.at("base"):
        return measure(plan.engine.tune, plan.tokenizer, sets, say=say)


def save_before(folder: Path, before: Mapping[str, SetResult]) -> None:
    """Keep the base's results, so that a resumed run need not measure them again."""
    write_json(folder / BEFORE, {name: result.as_json() for name, result in before.items()})


def continue_from(plan: Plan, folder: Path, sets: list[EvalSet], say: Say) -> tuple[Progress, dict[str, SetResult]]:
    """Bring the run back to its newest readable checkpoint.

    Raises:
        LuthierError: the folder holds no run, or it was made by another recipe.
    """
    run = read_run(folder)
    if run.facts.get("status") == "finished":
        raise LuthierError("this run has finished", where=str(folder), mend="start a new one: luthier train RECIPE")
    made_by = run.facts.get("recipe_hash")
    if made_by != plan.recipe.hash():
        raise LuthierError(
            f"this run was made by another recipe ({made_by}, not {plan.recipe.hash()})",
            where=str(folder),
            mend=f"use {folder / 'recipe.yaml'}",
        )
    kept = folder / BEFORE
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    results = {name: SetResult.from_json(one) for name, one in before.items()} or measure_base(plan, sets, say)
    save_before(folder, results)
    newest = checkpoint.latest(folder / "checkpoints")
    progress = Progress()
    if newest is None:
        say("there is no checkpoint yet: starting from the first step")
    else:
        facts = checkpoint.restore(newest, plan.engine)
        progress = Progress(**{**facts["progress"], "stopped": "", "interrupted": False})
        say(f"resuming from {newest.name}")
    # Steps taken after the checkpoint are taken again.
    lines = "".join(json.dumps(line) + "\n" for line in progress.history)
    (folder / "steps.jsonl").write_text(lines, encoding="utf-8")
    return progress, results


def save_checkpoint(plan: Plan, folder: Path, progress: Progress) -> None:
    """Write a checkpoint and drop the oldest."""
    root = folder / "checkpoints"
    facts = {"progress": asdict(progress), "recipe_hash": plan.recipe.hash(), "steps": plan.clock.steps}
    checkpoint.save(root / f"step-{progress.step}", plan.engine, facts)
    checkpoint.prune(root, plan.recipe.train.keep_checkpoints)


def _step_done(plan: Plan, folder: Path, progress: Progress, result: StepResult, tell: Tell) -> None:
    norm = next((s["norm"] for states in plan.engine.chain.state.values() for s in states.values() if "norm" in s), None)
    if norm is not None:
        progress.history[-1]["norm"] = norm
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(progress.history[-1]) + "\n")
    tell(plan, progress, result)


def mid_run(plan: Plan, sets: list[EvalSet]) -> Callable[[], Mapping[str, tuple[float, bool]]]:
    """Measure the sets in the middle of a run."""

    def evaluate() -> dict[str, tuple[float, bool]]:
        found = measure(plan.engine.tune, plan.tokenizer, sets)
        return {name: (result.value, result.higher_is_better) for name, result in found.items()}

    return evaluate


def cost(plan: Plan, progress: Progress) -> dict[str, Any]:
    """What training took."""
    losses = [line["loss"] for line in progress.history if line["loss"] is not None]
    warnings = plan.warnings()
    if progress.empty_steps:
        warnings.append(f"{progress.empty_steps} steps had no target and were not taken")
    if progress.stopped:
        warnings.append(f"stopped after step {progress.step} of {plan.clock.steps}: {progress.stopped}")
    return {
        "seconds": progress.seconds,
        "steps": progress.step,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "supervised_tokens_per_second": progress.supervised / progress.seconds if progress.seconds else None,
        "peak_memory_bytes": machine.peak_bytes(plan.device),
        "final_loss": losses[-1] if losses else None,
        "history": progress.history,
        "evaluations": progress.evaluations,
        "warnings": warnings,
    }


def what_changed(
    plan: Plan, before: Mapping[str, SetResult], after: Mapping[str, SetResult], noise: Mapping[str, float]
) -> dict[str, Any]:
    """Before against after, set by set."""
    metrics = {name: compare(result, after.get(name), noise=noise.get(name)) for name, result in before.items()}
    return {
        "metrics": metrics,
        "noise": dict(noise),
        "kept": share_kept(metrics),
        "weights_sha256": tuned_fingerprint(plan),
    }


def tuned_fingerprint(plan: Plan) -> str:
    """Identifies the tuned numbers: the model's, and those that stand beside it."""
    digest = hashlib.sha256(fingerprint(plan.model).encode())
    for name, one in sorted(plan.engine.tune.trained.items()):
        if one.form in ("factor", "free"):
            digest.update(name.encode())
            digest.update(one.master.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def keep_what_changed(plan: Plan, folder: Path, say: Say) -> dict[str, Any]:
    """Save the delta against a fresh copy of the base, and sum it up by block and role."""
    say("comparing the weights with the base")
    base = load_model(plan.source, dtype=plan.dtype).to(plan.device)  # type: ignore[arg-type]
    delta = Delta.of(plan.engine.tune, base, name=plan.source.name, fingerprint=plan.fingerprint)
    save_result(folder, plan.engine.tune, delta)
    return summary(delta, plan.parts, base)
