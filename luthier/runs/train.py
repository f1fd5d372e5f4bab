"""The whole story on one page: recipe, plan, measure, train, measure again, compare, keep, report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from luthier import __version__, disk, machine
from luthier.delta import Delta, summary
from luthier.errors import LuthierError, Say, silent
from luthier.evaluate.compare import base_noise, compare, share_retained
from luthier.evaluate.sets import EvalSet, SetResult, measure
from luthier.models.fingerprint import fingerprint
from luthier.models.sharding import whole
from luthier.planning.plan import Plan, make_plan
from luthier.recipe import Recipe, make_recipe, read_recipe, with_keys
from luthier.report import write_report
from luthier.report.compare import compared, write_comparison
from luthier.results.folder import FILE, STEPS, Run, new_folder, read_run, write_json
from luthier.results.lock import held
from luthier.results.opened import save_result
from luthier.results.start import load_start
from luthier.rows.system_turns import share_with_system
from luthier.rows.template import date_of
from luthier.runs.as_run import Watch, as_run, seen_rows
from luthier.runs.inputs import inputs_of
from luthier.runs.resume import (
    CHECKPOINTS,
    Before,
    check_resumable,
    continue_from,
    day_of,
    read_before,
    save_before,
    save_checkpoint,
    write_recipe,
)
from luthier.runs.trackers import Trackers, check_trackers, run_numbers, start_trackers
from luthier.training import pairs
from luthier.training.engine import StepResult
from luthier.training.loop import Plans, Progress
from luthier.training.loop import train as run_loop
from luthier.training.world import World
from luthier.tune import Tune
from luthier.tune.attach import NEW_TOKENS, trains_new_rows

Tell = Callable[[Plan, Progress, StepResult], None]


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    resume: str | Path | None = None,
    say: Say = silent,
    tell: Tell = lambda plan, progress, result: None,
    command: str = "",
    **keys: Any,
) -> Run:
    """Fine-tune a model as a recipe says, and show what changed.

    Args:
        recipe: a recipe, its data, or its file.
        resume: a run's folder, or its name under the recipe's `out`, to continue; the result is the same, bit for bit, as without the
            interruption.
        say: hears what is being done.
        tell: hears of every step.
        command: what a user would type to do this again.
        keys: a recipe's keys, instead of a recipe or over its own; techniques may be names, mappings or parts made by `luthier.part`.

    Returns:
        The run, with the tuned model in memory and everything else in its folder.

    Raises:
        LuthierError: a mistake in the recipe, the rows or the model, found before anything trains; a run to continue that is still
            running, has finished, or was begun with another recipe, other rows or another base; or numbers that are not finite, with
            the rows that made them.
    """
    recipe = with_keys(as_recipe(recipe), keys) if recipe is not None else as_recipe(keys)
    try:
        with machine.as_found():
            return _train(recipe, resume, say, tell, command)
    except BaseException:
        machine.free_broken_backward()
        raise


def _train(recipe: Recipe, resume: str | Path | None, say: Say, tell: Tell, command: str) -> Run:
    began = time.perf_counter()
    world = World.current()
    if not world.is_first:
        # All processes take every step and measure alike; the first one speaks and writes.
        say, tell = silent, _nothing
    check_trackers(recipe.track)
    if resume is None:
        plan = make_plan(recipe, say)
        folder = shared_folder(world, recipe)
        with alone(folder, world):
            return _train_in(folder, plan, False, say, tell, command, began)
    folder = read_run(resume, recipe.out).folder
    with alone(folder, world):
        return _train_in(folder, make_plan(recipe, say, today=day_of(folder)), True, say, tell, command, began)


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """Work in a run's folder, which its first process holds for all of them.

    Raises:
        LuthierError: another run does; in all processes.
    """
    with ExitStack() as until:
        refused: LuthierError | None = None
        if world.is_first:
            try:
                until.enter_context(held(folder))
            except LuthierError as error:
                refused = error
        told = world.from_first(None if refused is None else (refused.what, refused.where, refused.fix))
        if told is not None:
            raise LuthierError(told[0], where=told[1], fix=told[2])
        yield


def _train_in(folder: Path, plan: Plan, resumes: bool, say: Say, tell: Tell, command: str, began: float) -> Run:
    recipe, world, sets = plan.recipe, plan.engine.world, plan.sets
    facts = first_facts(plan, folder, command, sets)
    cut_anew = resumes and check_resumable(plan, folder, facts["inputs"], say)
    progress, measuring = Progress(), Watch()
    if world.is_first:
        if not resumes or cut_anew:
            write_recipe(folder, recipe, plan.tokenizer.chat_template)
        write_json(folder / FILE, facts)
    trackers = start_trackers(recipe.track if world.is_first else None, folder, recipe.name, recipe.as_plain())
    try:
        before = (read_before(folder, say) if resumes else None) or measuring(lambda: measure_base(plan, say))
        save_before(plan, folder, before)
        facts["metrics"] = {name: compare(result, None) for name, result in before.results.items()}
        if world.is_first:
            write_json(folder / FILE, facts)
        if resumes:
            progress = continue_from(plan, folder, say, cut_anew=cut_anew)
        machine.reset_peak(plan.device)
        say(f"training: {plan.clock.steps} steps")
        every, between = plan.between
        progress = run_loop(
            plan.engine,
            plan.feed,
            plan.clock,
            Plans(recipe.train.save_every, every, recipe.train.patience, recipe.train.best),
            progress,
            evaluate=partial(measuring, mid_run(plan, between, lambda found: trackers.log(progress.step, found), progress.notes))
            if between
            else None,
            save=lambda at: save_checkpoint(plan, folder, at, say),
            tell=lambda at, result: _step_done(plan, folder, at, result, tell, trackers),
            say=say,
        )
        facts |= cost(plan, progress)
        plan.engine.rest()
        if progress.interrupted:
            facts["status"] = "stopped"
            say(f"stopped after step {progress.step}; `luthier train --resume {folder}` goes on")
        else:
            after = measuring(lambda: measured(plan, sets, say, facts["warnings"])) if sets else {}
            facts["measuring_seconds"] = measuring.seconds if sets else None
            facts |= what_changed(plan, before, after)
            facts["delta"] = keep_what_changed(plan, folder, say)
            facts |= {"status": "finished", "total_seconds": time.perf_counter() - began}
            if plan.control is not None and world.is_first:
                facts["baseline_run"] = compare_with(plan.control, folder, facts, say)
    except BaseException as error:
        status, what = broken_off(error)
        facts |= {"status": status, "history": progress.history, "warnings": [*progress.notes, what]}
        leave_failed(plan, folder, tracked(trackers, facts), say)
        raise
    facts = tracked(trackers, facts)
    finish(plan, folder, facts, say)
    if facts["status"] == "finished" and recipe.train.save_every is None and world.is_first:
        disk.remove(folder / CHECKPOINTS)
    return Run(folder, facts, plan.model, plan.tokenizer, plan.engine.tune)


def _nothing(*heard: Any) -> None:
    """Shows nothing."""


def shared_folder(world: World, recipe: Recipe) -> Path:
    """A new folder, made by the first process and known to all."""
    return world.from_first(new_folder(recipe.out, recipe.name) if world.is_first else Path())


def finish(plan: Plan, folder: Path, facts: Mapping[str, Any], say: Say) -> None:
    """Write the page and the facts, however the run ended; the facts last, since a run that calls itself finished is whole."""
    if not plan.engine.world.is_first:
        return
    write_report(facts, folder / "report.html")
    write_json(folder / FILE, facts)
    say(f"report: {folder / 'report.html'}")


def broken_off(error: BaseException) -> tuple[str, str]:
    """How a run is said to have ended that an error broke off, and why."""
    if isinstance(error, LuthierError):
        return "failed", error.what
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "interrupted before the step in progress was done"
    return "failed", f"{type(error).__name__}: {error}"


def leave_failed(plan: Plan, folder: Path, facts: Mapping[str, Any], say: Say) -> None:
    """Note that a run failed, where that can still be written: a full disk must not hide why it failed."""
    try:
        finish(plan, folder, facts, say)
    except LuthierError as error:
        say(f"that the run failed could not be noted: {error.what}")


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
        "inputs": inputs_of(plan),
        "planned_steps": plan.clock.steps,
        "seed": recipe.seed,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": machine.describe(plan.device, plan.dtype),
        "processes": plan.engine.world.size,
        "model": {
            "name": plan.start.name,
            "origin": plan.start.origin,
            "added_tokens": dict(zip(plan.start.own_tokens, plan.parts.added, strict=True)),
            "architecture": plan.parts.architecture,
            "parameters": plan.total_parameters,
            "fingerprint": plan.fingerprint,
            "ancestors": [{"run": str(run.folder), "weights_sha256": run.facts.get("weights_sha256")} for run in plan.start.runs],
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
            "mixture": plan.feed.shares(),
            "cache": list(plan.cache),
            "mapped": list(plan.mapped),
            "stored": list(plan.numbered.said),
            "read": list(plan.files),
            "left_out": [one._asdict() for one in plan.left_out],
            "date": date_of(plan.tokenizer),
            "system_turns": share_with_system(plan.raw),
            "overlap": dict(plan.overlap),
            "seen": seen_rows(plan),
        },
        "plan": plan.lines(),
        "tune": ", ".join(
            [*(part.name for part in plan.chosen["tune"]), *([NEW_TOKENS] if trains_new_rows(plan.engine.tune) else [])]
        ),
        **as_run(plan),
        "trained_parameters": plan.trained_parameters,
        "total_parameters": plan.total_parameters,
        "warnings": plan.warnings(),
    }


def measure_base(plan: Plan, say: Say) -> Before:
    """The evaluation sets on the untouched model, and what measuring it again changes by itself."""
    sets, tune = plan.sets, plan.engine.tune
    if not sets:
        return Before({}, {})
    say("measuring the base: " + ", ".join(one.name for one in sets))
    with tune.at("base"):
        results = measured(plan, sets, say)
    if not plan.recipe.repeat_baseline:
        return Before(results, {})
    say("measuring some of it again, to know what repeating alone changes")
    return Before(results, tune.run(lambda: base_noise(tune, plan.tokenizer, sets, results, say=say)))


def measured(plan: Plan, sets: list[EvalSet], say: Say = silent, notes: list[str] | None = None) -> dict[str, SetResult]:
    """The evaluation sets on the model as it is. Sets whose answers cannot be scored are left out and noted, where there are notes: a
    judge that is away must not cost the weights."""

    def unscored(problem: LuthierError) -> None:
        assert notes is not None
        notes.append(f"{problem.where} was not measured: {problem.what}")
        say(notes[-1])

    hears = None if notes is None else unscored
    with torch.no_grad():
        return plan.engine.tune.run(lambda: measure(plan.engine.tune, plan.tokenizer, sets, say=say, unscored=hears))


def tracked(trackers: Trackers, facts: Mapping[str, Any]) -> dict[str, Any]:
    """End the tracking of a run. Returns its facts with what went wrong with trackers among the warnings."""
    trackers.finish(run_numbers(facts))
    return {**facts, "warnings": [*facts["warnings"], *trackers.warnings]}


def _step_done(plan: Plan, folder: Path, progress: Progress, result: StepResult, tell: Tell, trackers: Trackers) -> None:
    norm = next((s["norm"] for states in plan.engine.chain.state.values() for s in states.values() if "norm" in s), None)
    if norm is not None:
        progress.history[-1]["gradient_norm"] = norm
    if not plan.engine.world.is_first:
        return
    steps = folder / STEPS
    with disk.explained(steps), steps.open("a", encoding="utf-8") as file:
        file.write(json.dumps(progress.history[-1]) + "\n")
    trackers.log(progress.step, {key: value for key, value in progress.history[-1].items() if key != "step"})
    tell(plan, progress, result)


def mid_run(
    plan: Plan, sets: list[EvalSet], tell: Callable[[Mapping[str, float]], None], notes: list[str]
) -> Callable[[], Mapping[str, tuple[float, bool]]]:
    """Measure the sets in the middle of a run, and tell the values."""

    def evaluate() -> dict[str, tuple[float, bool]]:
        found = {name: (one.value, one.higher_is_better) for name, one in measured(plan, sets, notes=notes).items()}
        tell({name: value for name, (value, _) in found.items()})
        # Rounding must not make one process stop early and the others go on.
        return plan.engine.world.from_first(found)

    return evaluate


def cost(plan: Plan, progress: Progress) -> dict[str, Any]:
    """What training took."""
    losses = [line["loss"] for line in progress.history if line["loss"] is not None]
    warnings = plan.warnings()
    warnings += [*progress.notes, *pairs.warnings_of(progress.history)]
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
        "peak_memory_bytes": plan.engine.world.max(machine.peak_bytes(plan.device)),
        "final_loss": losses[-1] if losses else None,
        "history": progress.history,
        "evaluations": progress.evaluations,
        "warnings": warnings,
    }


def what_changed(plan: Plan, before: Before, after: Mapping[str, SetResult]) -> dict[str, Any]:
    """Before against after, set by set."""
    noise = before.noise
    metrics = {name: compare(result, after.get(name), noise=noise.get(name)) for name, result in before.results.items()}
    return {
        "metrics": metrics,
        "repeat_baseline": dict(noise),
        "retained": share_retained(metrics),
        "weights_sha256": tuned_fingerprint(plan.engine.tune),
    }


def compare_with(control: Run, folder: Path, facts: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """This run beside its control: a page, and its facts for `run.json`."""
    runs = [control.facts, facts]
    page = write_comparison(runs, folder / "compare.html", [control.folder, folder])
    say(f"comparison with {control.folder}: {page}")
    return {"run": str(control.folder), **compared(runs)}


def tuned_fingerprint(tune: Tune) -> str:
    """Identifies the tuned numbers: the model's, and those that stand beside it."""
    digest = hashlib.sha256(fingerprint(tune.model).encode())
    for name, one in sorted(tune.trained.items()):
        if one.form in ("factor", "free"):
            digest.update(name.encode())
            digest.update(whole(one.master.detach()).cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def keep_what_changed(plan: Plan, folder: Path, say: Say) -> dict[str, Any]:
    """Save the delta against a fresh copy of the base, and sum it up by block and role."""
    tune, is_first = plan.engine.tune, plan.engine.world.is_first
    if tune.root is None and not is_first:
        # Only a model that is spread over the processes needs all of them to be put together.
        return {}
    say("comparing the weights with the base")
    base = load_start(plan.start, plan.dtype, quantize=plan.recipe.quantize).to(plan.device)  # type: ignore[arg-type]
    delta = Delta.of(tune, base, name=plan.start.base_name, fingerprint=plan.fingerprint)
    if not is_first:
        return {}
    save_result(folder, tune, delta)
    return summary(delta, plan.parts, base)
