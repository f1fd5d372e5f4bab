"""Measuring a model or a run: evaluation sets, tasks of the harness, likelihoods of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier import machine
from luthier.errors import LuthierError, Say, silent
from luthier.evaluate.harness import Scores, harness
from luthier.evaluate.likelihood import row_likelihoods
from luthier.evaluate.planned import evaluation_sets
from luthier.evaluate.sets import SetResult, measure
from luthier.kinds import RowLikelihood
from luthier.recipe import Recipe
from luthier.results.folder import read_run
from luthier.results.opened import open_base, open_model, open_run
from luthier.results.start import is_run
from luthier.rows.shapes import Row
from luthier.rows.template import choose_for
from luthier.runs.rows import turns_of


def evaluate(model: str, recipe: Recipe, *, say: Say = silent, weights_only: bool = False) -> dict[str, SetResult]:
    """Measure a model or a run on the evaluation sets of a recipe."""
    if not recipe.evaluate:
        raise LuthierError("the recipe has no evaluation sets", where="evaluate", fix="add `evaluate: {name: {rows: FILE}}`")
    tune, tokenizer = open_model(model, out=recipe.out, say=say, precision=recipe.train.precision, weights_only=weights_only)
    if not is_run(model, recipe.out):
        choose_for(tokenizer, recipe.rows)
    head = tune.head[1] if tune.head is not None else None
    validated = recipe.rows.validate is not None
    sets = evaluation_sets(recipe.evaluate, recipe.train, head, recipe.rows.columns, validated=validated)
    return measure(tune, tokenizer, sets, say=say)


def evaluate_harness(
    name: str, tasks: Sequence[str], folder: Path, *, out: str = "runs", limit: int | None = None, say: Say = silent
) -> dict[str, Scores]:
    """Measure a model or a run on tasks of the language model evaluation harness.

    Args:
        name: a model's name, or a run's folder or name.
        tasks: names of tasks.
        folder: holds the tasks' YAML files.
        out: the folder that holds the run folders.
        limit: most rows of each task; None for all.

    Returns:
        `after`: what it scores now; for a run also `before`: what its base scores.

    Raises:
        LuthierError: as `harness`; or there is no such model or run.
    """
    if not is_run(name, out):
        tune, tokenizer = open_model(name, out=out, say=say)
        return {"after": harness(tune, tokenizer, tasks, folder, limit=limit)}
    run = read_run(name, out)
    tune, tokenizer = open_run(run, say=say, merged=False)
    say("measuring the tuned model")
    after = harness(tune, tokenizer, tasks, folder, limit=limit)
    # A run's changes in place cannot be taken back: the base is loaded anew, and only now, so that one model is held.
    del tune
    machine.free_what_is_gone()
    base, tokenizer = open_base(run, say=say)
    say("measuring the base")
    return {"before": harness(base, tokenizer, tasks, folder, limit=limit), "after": after}


def likelihood_of_rows(
    model: str, rows: Sequence[Row], *, loss_on: str = "assistant", out: str = "runs", precision: str = "auto", say: Say = silent
) -> list[RowLikelihood]:
    """How likely a model or a run finds what each row teaches; what `luthier.rows.select.score_rows` runs models with.

    Args:
        model: a model's name, or a run's folder or name.
        rows: checked rows.
        loss_on: which turns are targets, as under `rows` in a recipe.
        out: the folder that holds the run folders.
        precision: of a model's weights, as in a recipe; a run brings its own.
        say: hears what is being done.

    Raises:
        LuthierError: there is no such model or run, or `luthier.evaluate.likelihood.row_likelihoods` refuses a row.
    """
    turns = turns_of(loss_on)
    tune, tokenizer = open_model(model, out=out, say=say, precision=precision)
    say(f"{model}: how likely it finds {len(rows)} rows")
    return row_likelihoods(tune, tokenizer, rows, loss_on=turns)
