"""The language model evaluation harness (lm-eval) on a model in memory, with whatever is attached to it and nothing merged.

Tasks are the user's own YAML files. The harness's built-in ones fetch their data from the hub, and are left out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from luthier import machine
from luthier.errors import LuthierError, nearest
from luthier.models.modes import evaluating
from luthier.tune import Tune

_BOOTSTRAP = 1000
"""Resamples for the standard errors of metrics that have no formula."""


class Score(NamedTuple):
    """One metric of one task."""

    value: float
    stderr: float | None
    """Its standard error over the task's rows; None where the harness gives none."""


Scores = Mapping[str, Mapping[str, Score]]
"""By task and metric. A metric behind a filter other than `none` is called `metric,filter`."""


def harness(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: str | Path,
    *,
    limit: int | None = None,
    batch_rows: int = 8,
) -> Scores:
    """Score a model on tasks of the language model evaluation harness.

    Args:
        tune: the model as it is now; inside `tune.at("base")` it is the base.
        tokenizer: the model's tokenizer.
        tasks: names of tasks, as their files give them under `task`.
        folder: holds the tasks' YAML files, at any depth. Data files that they name count from the working folder. A
            task may bring Python code of its own (`!function`), which the harness runs.
        limit: most rows of each task, from the start; None for all.
        batch_rows: rows of one forward pass.

    Raises:
        LuthierError: the harness is not installed, a task is not in the folder or cannot be run, or the model has a
            trained prompt, which stands before rows that luthier encodes and no others.
    """
    lm_eval = _installed()
    if tune.prompt_length and not tune.is_off:
        raise LuthierError(
            "the harness encodes its own rows, and a trained prompt would not stand before them",
            where="harness",
            fix="measure with evaluation sets of the recipe: luthier eval RUN RECIPE",
        )
    with _quiet():
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        _check_tasks(tasks, manager.all_tasks, folder)
        with evaluating(tune.model), _draws_as_found():
            model = lm_eval.models.huggingface.HFLM(
                pretrained=tune.model, tokenizer=tokenizer, backend="causal", batch_size=batch_rows
            )
            try:
                found = lm_eval.simple_evaluate(
                    model,
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=_BOOTSTRAP,
                    log_samples=False,
                )
            # Whatever a task's file asks for is raised as whatever the harness stumbles over.
            except Exception as error:
                raise LuthierError(
                    f"the harness cannot run this: {type(error).__name__}: {error}",
                    where=", ".join(tasks),
                    fix=f"check the tasks in {folder}, and that their data files exist",
                ) from error
    return {task: _scores(found["results"][task]) for task in found["results"]}


def plain_scores(found: Mapping[str, Scores]) -> dict[str, Any]:
    """Scores, by when they were measured, as plain data."""
    return {
        when: {task: {name: score._asdict() for name, score in metrics.items()} for task, metrics in scores.items()}
        for when, scores in found.items()
    }


def _installed() -> ModuleType:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise LuthierError(
            f"the evaluation harness is not installed ({error})", where="harness", fix='pip install "luthier[lm-eval]"'
        ) from error
    module: ModuleType = lm_eval
    return module


def _check_tasks(tasks: Sequence[str], known: Sequence[str], folder: str | Path) -> None:
    if not tasks:
        raise LuthierError("no task is named", where="harness", fix=nearest("", known) or f"put tasks into {folder}")
    for task in tasks:
        if task not in known:
            fix = nearest(task, known) or f"there are no tasks in {folder}: give a folder with YAML files"
            raise LuthierError(f"there is no task `{task}`", where=str(folder), fix=fix)


def _scores(found: Mapping[str, Any]) -> dict[str, Score]:
    """The harness's `metric,filter` and `metric_stderr,filter` as pairs."""
    scores = {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = found.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else key
        scores[name] = Score(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    return scores


@contextlib.contextmanager
def _draws_as_found() -> Iterator[None]:
    """The harness seeds every generator there is for itself; the caller's go on as if nothing had been."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with machine.as_found():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log lines and progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
