"""Measuring a model or a run: evaluation sets, tasks of the harness, likelihoods of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier import machine
from luthier.errors import LuthierError, Say, silent
from luthier.evaluate.compare import compare
from luthier.evaluate.likelihood import row_likelihoods
from luthier.evaluate.planned import evaluation_sets
from luthier.evaluate.served import ENDPOINT, measure_served
from luthier.evaluate.sets import EvalSet, SetResult, check, measure
from luthier.generation.endpoint import Endpoint
from luthier.kinds import RowLikelihood
from luthier.recipe import EvaluationSet, Recipe, TrainRecipe
from luthier.results.folder import read_run
from luthier.results.opened import open_base, open_model, open_run
from luthier.results.start import is_run
from luthier.rows.shapes import Row
from luthier.rows.template import choose_for
from luthier.runs.rows import turns_of
from luthier.tune import Tune


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


def evaluate_tasks(
    name: str, asked: Mapping[str, EvaluationSet], *, out: str = "runs", say: Say = silent, weights_only: bool = False
) -> tuple[dict[str, SetResult], dict[str, Any]]:
    """Measure a model, or a run and its base, on tasks of the language model evaluation harness.

    Args:
        name: a model's name, or a run's folder or name.
        asked: evaluation sets of tasks, by name, as in a recipe.
        out: the folder that holds the run folders.
        say: hears what is being done.
        weights_only: of a run, the tuned weights without what stands beside them.

    Returns:
        What it reaches now, and for a run the comparison with its base, as `luthier.evaluate.compare.compare` makes it; else nothing.

    Raises:
        LuthierError: as `luthier.evaluate.harness.benchmarks`; or there is no such model or run.
    """
    # What cannot be asked is found before a model is loaded.
    sets = evaluation_sets(asked, TrainRecipe())
    if not is_run(name, out):
        return _checked(*open_model(name, out=out, say=say), sets, say), {}
    run = read_run(name, out)
    say("measuring the tuned model")
    after = _checked(*open_run(run, say=say, merged=False, weights_only=weights_only), sets, say)
    # A run's changes in place cannot be taken back: the base is loaded anew, and only now, so that one model is held.
    machine.free_what_is_gone()
    say("measuring the base")
    before = _checked(*open_base(run, say=say), sets, say)
    return after, {one: compare(before[one], after[one]) for one in after}


def evaluate_endpoint(
    address: str, model: str, recipe: Recipe, *, api_key_env: str | None = None, say: Say = silent
) -> dict[str, SetResult]:
    """Measure a model behind an OpenAI-compatible endpoint on the evaluation sets of a recipe.

    Args:
        address: `endpoint:` and its address, such as `endpoint:http://localhost:8000/v1`.
        model: which of its models answers.
        recipe: its sets are asked; of what it says of models and training nothing counts.
        api_key_env: the environment variable with the key, as in `luthier.generation.endpoint.Endpoint`.
        say: hears what is being done.

    Raises:
        LuthierError: there are no sets, or as `luthier.evaluate.served.measure_served` and `luthier.generation.endpoint.Endpoint`.
    """
    if not recipe.evaluate:
        raise LuthierError("the recipe has no evaluation sets", where="evaluate", fix="add `evaluate: {name: {rows: FILE}}`")
    if not model:
        raise LuthierError("no model is named", where="luthier eval", fix="name one of the endpoint's: --model-name NAME")
    # Another model may be served by the same name tomorrow: nothing that was answered before counts.
    client = Endpoint(address.removeprefix(ENDPOINT), model, api_key_env=api_key_env, cache=False)
    sets = evaluation_sets(recipe.evaluate, TrainRecipe(), None, recipe.rows.columns)
    return measure_served(client, sets, say=say)


def _checked(tune: Tune, tokenizer: PreTrainedTokenizerBase, sets: Sequence[EvalSet], say: Say) -> dict[str, SetResult]:
    check(tune, tokenizer, sets)
    return measure(tune, tokenizer, sets, say=say)


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
