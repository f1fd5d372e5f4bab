"""The metric of an evaluation set, from what a recipe or Python says: a name, a name with options, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pydantic
from transformers import PreTrainedTokenizerBase

from luthier import registry
from luthier.errors import LuthierError, nearest
from luthier.evaluate import own
from luthier.evaluate.items import Item
from luthier.evaluate.metrics import METRICS, Metric
from luthier.evaluate.scoring import Scoring
from luthier.rows.shapes import Row
from luthier.tune import Tune


class Task(Protocol):
    """A task that asks and scores by itself; `luthier.evaluate.harness` makes them."""

    def check(self, tune: Tune, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find what would stop `measured`, without running the model."""

    def measured(
        self, tune: Tune, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, batch_tokens: int
    ) -> tuple[list[Item], Any, dict[str, Any]]:
        """The items of rows, what was asked, and what reports tell beside them."""

    @property
    def described(self) -> str:
        """In a line."""


class Chosen(NamedTuple):
    """A metric, ready to score."""

    name: str
    metric: Metric
    scoring: Scoring
    """How answers are scored; empty where none are generated."""
    options: Mapping[str, Any] = {}
    """Those that were given, as plain data."""
    code: str = ""
    """Identifies the code of a metric of your own, or of a task; empty for a metric that comes with luthier."""
    task: Task | None = None
    """What asks and scores instead, of a task."""

    def asked(self, asked: Any) -> list[Any]:
        """What decides the answers and their scores, beside the model: only results that share it are compared."""
        return [self.name, asked, *([dict(self.options)] if self.options else []), *([self.code] if self.code else [])]


def choose(spec: Any, where: str) -> Chosen:
    """Find a metric.

    Args:
        spec: a name, `{name: {option: value}}`, or a function; or what was found before.
        where: for errors.

    Raises:
        LuthierError: there is no such metric or option, with the nearest name, or an option is of the wrong type.
    """
    if isinstance(spec, Chosen):
        return spec
    if callable(spec):
        return _of_function(spec, own.name_of(spec), {}, where)
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            names = ", ".join(map(str, spec)) or "none"
            raise LuthierError(
                f"one metric at a time: this names {names}", where=where, fix="write metric: {name: {option: value}}"
            )
        ((name, options),) = spec.items()
        if options is not None and not isinstance(options, Mapping):
            fix = f"write metric: {{{name}: {{option: value}}}}"
            raise LuthierError(f"the options of `{name}` must be a mapping, not {options!r}", where=where, fix=fix)
        return _named(str(name), {str(key): value for key, value in (options or {}).items()}, where)
    return _named(str(spec), {}, where)


def metric_of(name: str, *, higher_is_better: bool) -> Metric:
    """What is known of a metric by its name alone, such as of one that was measured before; of your own, what was kept of it."""
    if name in METRICS:
        return METRICS[name]
    if is_of_task(name):
        return Metric("task", higher_is_better, "a metric of a task of the LM Evaluation Harness")
    return Metric("generation", higher_is_better, "a metric of your own", compares=False)


def is_of_task(name: str) -> bool:
    """Whether a metric is one of the evaluation harness, whose names say by which filter answers are taken: `exact_match,strict-match`."""
    return "," in name


def _named(name: str, options: dict[str, Any], where: str) -> Chosen:
    if name not in METRICS:
        function = own.of_file(name)
        if function is None:
            fix = nearest(name, [*METRICS, *own.names()]) or "`luthier metrics` lists them"
            raise LuthierError(f"there is no metric `{name}`", where=where, fix=fix)
        return _of_function(function, name, options, where)
    if name in own.names():
        # Which of the two is meant cannot be told, and a silent choice would measure the other one.
        what = f"`{name}` comes with luthier, and a file of your own has the same name"
        raise LuthierError(what, where=where, fix=f"rename {registry.own_files(registry.METRIC)[name]} and its function")
    known = METRICS[name]
    if known.make is None:
        if options:
            raise LuthierError(f"`{name}` has no options", where=where, fix=f"write metric: {name}")
        return Chosen(name, known, Scoring(known.score, readable=known.readable))
    checked = _checked(known.make, name, options, where)
    try:
        return Chosen(name, known, known.make(**checked), options)
    except LuthierError as problem:
        raise LuthierError(problem.what, where=f"{where}, {problem.where}", fix=problem.fix) from problem


def _of_function(function: Callable[..., Any], name: str, options: dict[str, Any], where: str) -> Chosen:
    if name in METRICS:
        raise LuthierError(f"`{name}` comes with luthier", where=where, fix="give the function another name")
    checked = _checked(own.options_of(function), name, options, where)
    scoring = own.scoring_of(function, name, checked, where)
    metric = metric_of(name, higher_is_better=own.is_higher_better(function))
    return Chosen(name, metric._replace(meaning=own.meaning_of(function)), scoring, options, own.identity(function))


def _checked(factory: Callable[..., Any], name: str, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of the right types, with the defaults of those that are not given."""
    try:
        found = registry.options_model(factory, name)(**options)
    except pydantic.ValidationError as error:
        raise registry.option_error(error, name, where, factory, see="luthier metrics") from None
    return {key: getattr(found, key) for key in type(found).model_fields}
