"""What one process of the lab does: train a stage, or put a question to a chain of stages.

A job leaves its result in the lab's cache and nowhere else. It is plain data, so that any process can take it: the recipes, which may
be long and hold functions, are made again from the replication's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock

from luthier import disk, machine, registry
from luthier.errors import LuthierError
from luthier.lab import replications
from luthier.lab.cache import content, keep, key_of, measure_sources, read, replication_source, stage_key
from luthier.lab.replication import Finished, Recipe, Replication, Setting, Variant
from luthier.recipe import make_recipe
from luthier.results.folder import Run, read_run
from luthier.runs.export import export
from luthier.runs.train import train

Question = Literal["measure", "choose"]
STAGE_SEEDS = 1_000_000
"""What the seed grows by from stage to stage."""
SCORE = "score"
"""What the answer of `choose` is kept as."""


class Job(NamedTuple):
    """A piece of work for one process: plain data, from which the replication's file makes the recipes again."""

    root: str
    replication: str
    variant: str
    rate: float | None
    setting: Setting
    device: str
    keys: tuple[str, ...]
    """Of the chain's stages."""
    content: str
    """Identifies the chain's recipes: the replication's file must make the same ones in every process."""
    number: int = 0
    """Of the stage to train."""
    question: Question = "measure"
    answer: str = ""
    """The file that takes the answer."""


Do = Callable[[Job], LuthierError | None]
RunAll = Callable[[Do, Sequence[Job]], Iterable[LuthierError | None]]
"""Does jobs in any order, and gives what stopped each."""


def variant_recipes(variant: Variant, rate: float | None, setting: Setting, bases: Sequence[Recipe]) -> list[Recipe]:
    """The recipes of a variant's stages, with all that the lab sets but the model."""
    recipes = []
    for number, base in enumerate(bases):
        recipe = with_rate(base, rate)
        changed = variant.change(deepcopy(recipe), number, setting) if callable(variant.change) else merged(recipe, variant.change)
        if changed is None:
            continue
        # A technique that draws at its start draws anew in each stage.
        recipes.append(
            {
                "repeat_baseline": False,
                **with_rate(changed, rate),
                "seed": setting.seed + variant.seed_offset + STAGE_SEEDS * number,
            }
        )
    return recipes


def with_rate(recipe: Recipe, rate: float | None) -> Recipe:
    """A recipe with a learning rate, unless it names one."""
    train = recipe.get("train") or {}
    return recipe if rate is None or "learning_rate" in train else {**recipe, "train": {**train, "learning_rate": rate}}


def merged(recipe: Mapping[str, Any], change: Mapping[str, Any], where: str = "") -> Recipe:
    """A recipe with some keys changed, mapping by mapping; the value of a technique's key is replaced as a whole."""
    result = dict(recipe)
    for key, value in change.items():
        mine, place = result.get(key), f"{where}{key}"
        deeper = isinstance(mine, Mapping) and isinstance(value, Mapping) and place not in registry.KEYS
        result[key] = merged(mine, value, f"{place}.") if deeper else value  # type: ignore[arg-type]
    return result


def full_recipe(recipe: Recipe, device: str, **keys: Any) -> Recipe:
    """What is trained: one thread on one device, so that the machine's cores change nothing."""
    return {**recipe, "train": {**(recipe.get("train") or {}), "threads": 1, "device": device}, **keys}


def chain_keys(recipes: Sequence[Recipe], start: str, device: str, apart: bool = False) -> tuple[str, ...]:
    """Names a chain's stages, each by its recipe and by what it starts from."""
    keys: list[str] = []
    for recipe in recipes:
        made = make_recipe(full_recipe(recipe, device, model="stage"), where="a stage's recipe")
        keys.append(stage_key(made, keys[-1] if keys and not apart else start, device))
    return tuple(keys)


def stage_path(root: Path, key: str) -> Path:
    """The facts of a finished stage."""
    return root / "stages" / key / "stage.json"


def answer_path(job: Job) -> Path:
    """Where the answer to a job's question is kept."""
    source = replication_source(replications.file_of(job.replication))
    facts = {
        "replication": [job.replication, source],
        "variant": job.variant,
        "setting": job.setting,
        "stages": job.keys,
        "question": job.question,
    }
    return Path(job.root) / "measures" / f"{key_of({**facts, 'sources': measure_sources()})}.json"


def answer_of(place: Path) -> Mapping[str, float | None]:
    """The numbers that were kept; none where training broke off."""
    numbers: Mapping[str, float | None] = (read(place) or {})["numbers"]
    return numbers


def content_of(recipes: Sequence[Recipe]) -> str:
    """Identifies recipes by their content."""
    return key_of(content(list(recipes), "recipe"))


def train_stage(job: Job) -> LuthierError | None:
    """Train one stage, unless another process has meanwhile. Returns what stopped it, other than numbers that are not finite."""
    return _told(partial(_train_stage, job), job)


def measure_chain(job: Job) -> LuthierError | None:
    """Put a job's question to its chain and keep the answer."""
    return _told(partial(_measure_chain, job), job)


def _told(work: Callable[[], None], job: Job) -> LuthierError | None:
    try:
        work()
    except LuthierError as error:
        where = f"replication {job.replication}, variant {job.variant}, seed {job.setting.seed}, learning rate {job.rate}: {error.where}"
        return LuthierError(error.what, where=where, fix=error.fix)
    finally:
        # The same process does the next job.
        machine.free_what_is_gone()
    return None


def _train_stage(job: Job) -> None:
    recipe = _recipes(job)[job.number]
    root, key = Path(job.root), job.keys[job.number]
    place = stage_path(root, key)
    with _alone(place.parent):
        if read(place) is not None:
            return
        first = job.number == 0 or replications.find(job.replication).apart
        model = job.setting.model if first else _merged_model(root, job.keys[job.number - 1])
        if model is None:
            keep(place, {"diverged": "the stage before broke off"})
            return
        # A run that was killed is begun anew: it takes no longer than its own steps.
        disk.remove(place.parent)
        full = full_recipe(recipe, job.device, model=model, name="run", out=str(place.parent))
        try:
            run = train(full)
        except LuthierError as error:
            if not diverged(error):
                raise
            keep(place, {"diverged": error.what})
            return
        if run.facts["status"] != "finished":
            raise LuthierError("the run was stopped", fix="call `luthier replicate` again: it goes on")
        keep(place, {"run": run.folder.name, "seconds": run.facts["seconds"]})


def _recipes(job: Job) -> list[Recipe]:
    """The recipes of a job's chain.

    Raises:
        LuthierError: they are others than those whose keys the job holds.
    """
    replication = replications.find(job.replication)
    recipes = variant_recipes(_variant(replication, job), job.rate, job.setting, replication.stages(job.setting))[: len(job.keys)]
    if content_of(recipes) != job.content:
        raise LuthierError(
            "the replication's stages are others each time they are made",
            fix="draw everything from the setting's seed, and sort what comes out of a set",
        )
    return recipes


def _variant(replication: Replication, job: Job) -> Variant:
    return next(variant for variant in replication.variants if variant.name == job.variant)


def _merged_model(root: Path, key: str) -> str | None:
    """The folder of a stage's tuned model; None where the stage broke off."""
    run = _run_of(root, key)
    if run is None:
        return None
    folder = stage_path(root, key).parent / "model"
    with _alone(folder.parent):
        if not folder.exists():
            export(str(run.folder), folder)
    return str(folder)


def _run_of(root: Path, key: str) -> Run | None:
    place = stage_path(root, key)
    facts = read(place) or {}
    return read_run(place.parent / facts["run"]) if "run" in facts else None


def _measure_chain(job: Job) -> None:
    replication, place = replications.find(job.replication), Path(job.answer)
    runs = [run for key in job.keys if (run := _run_of(Path(job.root), key)) is not None]
    if len(runs) < len(job.keys):
        keep(place, {"numbers": {}, "diverged": "training broke off"})
        return
    finished = Finished(job.setting, _variant(replication, job), runs)
    try:
        found = replication.measure(finished) if job.question == "measure" else {SCORE: replication.choose(finished)}
    except LuthierError as error:
        if not diverged(error):
            raise
        keep(place, {"numbers": {}, "diverged": error.what})
        return
    numbers = {name: float(value) if math.isfinite(value) else None for name, value in found.items()}
    keep(place, {"numbers": numbers})


def diverged(error: LuthierError) -> bool:
    """Whether a run broke off because its numbers were no longer finite: what a learning rate that is too large leads to."""
    return "finite" in error.what


def _alone(folder: Path) -> FileLock:
    """While held, no other process works on a stage. The system frees it when its holder is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f"{folder.name}.lock"))
