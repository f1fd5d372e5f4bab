"""A sweep from beginning to end: variants, learning rates chosen alike, every seed at the chosen rate, one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from luthier import __version__
from luthier.errors import LuthierError, Say, silent
from luthier.lab.replication import CHOOSING_SEED
from luthier.lab.runner import Choice
from luthier.planning.attach import advised_rate
from luthier.recipe.parts import choose_parts
from luthier.report.story import gathered
from luthier.results.folder import write_json
from luthier.sweep.answer import answer_of
from luthier.sweep.facts import Measures, Rated, floor_of, loss_of, score_of, set_facts, variant_facts
from luthier.sweep.grid import RATE_KEY, Asked, Variant, choosing_set, read_words, target_set, variants_of
from luthier.sweep.page import write_sweep
from luthier.sweep.processes import find_ray, local, on_ray
from luthier.sweep.runs import Job, RunAll, is_done, job_of, outcome
from luthier.sweep.search import begin, choose, find_optuna, rates_around, rates_beyond, side_of, taught_nothing

FACTS, PAGE = "sweep.json", "sweep.html"


class Sweep(NamedTuple):
    """What is compared, where and how."""

    asked: Asked
    variants: Sequence[Variant]
    measures: Measures
    root: Path
    run_all: RunAll
    say: Say

    @property
    def first_seed(self) -> int:
        """The recipe's seed."""
        return self.variants[0].recipe.seed

    @property
    def seeds(self) -> list[int]:
        """Those of the runs that are reported."""
        return [self.first_seed + number for number in range(self.asked.settings.seeds)]

    @property
    def choosing_seed(self) -> int:
        """That of the runs that choose rates; never one of the others."""
        return self.first_seed + CHOOSING_SEED


def sweep(
    recipe: str | Path,
    words: Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    ray: bool = False,
    say: Say = silent,
    command: str = "",
) -> dict[str, Any]:
    """Run a recipe with every combination of the listed values, and show them side by side.

    Each variant's learning rate is chosen first, from the same grid around the rate that `luthier train` would take, by one evaluation
    set at a seed of its own. Then every variant runs at every seed. A run that is finished is not made again.

    Args:
        recipe: its file.
        words: `key=value` and `key=value,value`, with the sweep's own `seeds`, `learning_rates`, `jobs` and `choose_by`.
        folder: of the sweep; none: `sweeps/NAME`.
        ray: hand the runs to Ray instead of processes of this machine.
        say: hears what is being done.
        command: what a user would type to do this again.

    Returns:
        What `sweep.json` holds. `sweep.html` lies beside it.

    Raises:
        LuthierError: a mistake in the words or the recipe, Optuna or Ray is not installed, or another process works on this sweep.
            A variant that fails is no error: the others go on, and the page says why.
    """
    asked = read_words(words)
    variants = variants_of(Path(recipe), asked)
    chosen_by = choosing_set(variants[0].recipe, asked.settings.choose_by)
    rates = [_advice(variant) for variant in variants]
    root = Path(folder) if folder is not None else Path("sweeps") / variants[0].recipe.name
    if ray:
        find_ray()
    run_all = on_ray if ray else local(asked.settings.jobs)
    measures = Measures(chosen_by, target_set(variants[0].recipe, chosen_by))
    with _alone(root):
        work = Sweep(asked, variants, measures, root, run_all, say)
        rated = _choose_rates(work, rates)
        jobs = [_reported(work, variant, one) for variant, one in zip(variants, rated, strict=True)]
        _do(work, [job for several in jobs for job in several], "runs at the chosen learning rates")
        found = {**_first_facts(work, Path(recipe), command, ray), **_results(work, rated, jobs)}
        found["warnings"] = _warnings([job for one in rated for job in one.search] + [job for several in jobs for job in several])
        found["answer"] = answer_of(found, _target_entries(work, jobs))
        write_json(root / FACTS, found)
        say(f"page: {write_sweep(found, root / PAGE)}")
    return found


def _advice(variant: Variant) -> tuple[float, str]:
    """The learning rate that `luthier train` would take, and where it comes from."""
    return advised_rate(variant.recipe.train, choose_parts(variant.recipe))


def _alone(root: Path) -> AbstractContextManager[object]:
    """Held for as long as the block that it opens; the system frees it when its holder is killed."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return FileLock(root / ".lock").acquire(timeout=0)
    except Timeout:
        raise LuthierError("another process works on this sweep", where=str(root), fix="wait for it, or use --out") from None
    except OSError as error:
        what = f"the sweep's folder cannot be made: {error}"
        raise LuthierError(what, where=str(root), fix="name a folder that can be written to with --out") from None


def _choose_rates(work: Sweep, advice: Sequence[tuple[float, str]]) -> list[Rated]:
    count = work.asked.settings.learning_rates
    if RATE_KEY in work.asked.listed or count == 1:
        note = "" if RATE_KEY in work.asked.listed else "the advised learning rate, without a search"
        return [Rated(Choice(rate, note=note), rate, source) for rate, source in advice]
    find_optuna()
    grids = [rates_around(center, count) for center, _ in advice]
    _try(work, grids, "choosing learning rates")
    first = _chosen(work, grids, advice)
    # What taught nothing at any rate is likelier to want a larger one than a smaller one.
    sides = [side_of(one.choice) if one.tuned else 1 for one in first]
    added = [rates_beyond(center, count, side) for (center, _), side in zip(advice, sides, strict=True)]
    if not any(added):
        return first
    _try(work, added, "learning rates beyond the end of a grid")
    found = _chosen(work, [grid + more for grid, more in zip(grids, added, strict=True)], advice)
    return [one._replace(added=more) for one, more in zip(found, added, strict=True)]


def _try(work: Sweep, grids: Sequence[Sequence[float]], words: str) -> None:
    """Run every variant at its rates."""
    pairs = zip(work.variants, grids, strict=True)
    _do(work, [job_of(variant, rate, work.choosing_seed, work.root) for variant, grid in pairs for rate in grid], words)


def _chosen(work: Sweep, grids: Sequence[Sequence[float]], advice: Sequence[tuple[float, str]]) -> list[Rated]:
    """The learning rate of every variant, from the runs at the rates of its grid."""
    chosen_by = work.measures.chosen_by
    rated = []
    for variant, (center, source), grid in zip(work.variants, advice, grids, strict=True):
        search = begin(grid)
        tried = tuple(job_of(variant, rate, work.choosing_seed, work.root) for rate in search.trials)
        found = {job.rate: outcome(job) for job in tried}
        losses = {rate: loss for rate, one in found.items() if (loss := loss_of(one, chosen_by)) is not None}
        choice = choose(search, {rate: score_of(one, chosen_by) for rate, one in found.items()}, losses)
        floor = next((floor for one in found.values() if (floor := floor_of(one, chosen_by)) is not None), None)
        rated.append(Rated(choice, center, source, tried, tuned=not taught_nothing(choice, floor)))
    return rated


def _reported(work: Sweep, variant: Variant, rated: Rated) -> list[Job]:
    rate = rated.choice.rate
    return [] if rate is None else [job_of(variant, rate, seed, work.root) for seed in work.seeds]


def _do(work: Sweep, jobs: Sequence[Job], words: str) -> None:
    todo = [job for job in jobs if not is_done(job)]
    work.say(f"{words}: {len(jobs)} runs, {len(jobs) - len(todo)} of them done before")
    if not todo:
        return
    # Closed whatever happens: an interrupt that falls between two runs must stop those under way too.
    with closing(work.run_all(todo)) as ended:
        for number, job in enumerate(ended, start=1):
            error = outcome(job).error
            how = f"stopped: {error['error']}" if error else "finished"
            work.say(f"{words}: {number} of {len(todo)}: {job.variant}, learning rate {job.rate:g}, seed {job.seed}: {how}")


def _first_facts(work: Sweep, recipe: Path, command: str, ray: bool) -> dict[str, Any]:
    settings = work.asked.settings
    return {
        "luthier": __version__,
        "name": work.variants[0].recipe.name,
        "folder": str(work.root),
        "recipe": str(recipe),
        "command": command,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": ", ".join(dict.fromkeys(variant.recipe.model for variant in work.variants)),
        "keys": work.asked.listed,
        "seeds": work.seeds,
        "learning_rates": settings.learning_rates,
        "choosing_seed": work.choosing_seed,
        "chosen_by": work.measures.chosen_by,
        "target": work.measures.target,
        "where": "Ray" if ray else "this machine",
        "jobs": None if ray else settings.jobs,
    }


def _warnings(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """What finished runs warn of, each once, with the runs that say it."""
    finished = {job.name: facts for job in jobs if (facts := outcome(job).facts) is not None}
    return [{"warning": one.text, "runs": list(one.runs), "who": one.who} for one in gathered(finished)]


def _target_entries(work: Sweep, jobs: Sequence[Sequence[Job]]) -> dict[str, list[Mapping[str, Any] | None]]:
    """By variant, what each of its runs says of the target, items included; None where it was not finished."""
    target = work.measures.target
    return {
        variant.name: [((outcome(job).facts or {}).get("metrics") or {}).get(target) for job in several]
        for variant, several in zip(work.variants, jobs, strict=True)
    }


def _results(work: Sweep, rated: Sequence[Rated], jobs: Sequence[Sequence[Job]]) -> Mapping[str, Any]:
    finished = [facts for several in jobs for job in several if (facts := outcome(job).facts) is not None]
    variants = zip(work.variants, rated, jobs, strict=True)
    return {
        "sets": set_facts(finished),
        "variants": [variant_facts(variant, one, work.measures, runs) for variant, one, runs in variants],
    }
