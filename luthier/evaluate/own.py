"""Metrics of your own: a function in Python, or a file in a folder that the environment names.

A file is found as techniques of your own are: `LUTHIER_METHODS` names a folder, and `metric/politeness.py` in it with a function
`politeness` makes `metric: politeness` valid. A recipe alone never runs code: the folder is named by whoever runs it.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy

from luthier import disk, registry
from luthier.errors import LuthierError, Say, cut_short
from luthier.evaluate.scoring import Scored, Scoring
from luthier.rows.shapes import Row

ONE, ALL = "answer", "answers"
"""Names of the first parameter: one answer and its row, or all answers and their rows."""
_ATTRIBUTE = "higher_is_better"
_MODULES = f"luthier_methods.{registry.METRIC}"
_RIGHT = f"write `def politeness({ONE}, row)`, which returns a number, or `def politeness({ALL}, rows)`, which returns one for each"

Function = TypeVar("Function", bound=Callable[..., Any])


def metric(*, higher_is_better: bool = True) -> Callable[[Function], Function]:
    """Say of a metric of your own what its numbers mean. A function without this has higher numbers for better answers.

    Args:
        higher_is_better: whether it has.
    """

    def put(function: Function) -> Function:
        setattr(function, _ATTRIBUTE, higher_is_better)
        return function

    return put


def is_higher_better(function: Callable[..., Any]) -> bool:
    """Whether higher numbers are better ones."""
    return bool(getattr(function, _ATTRIBUTE, True))


def names() -> list[str]:
    """The metrics in folders that the environment names, or `luthier.registry.add_folder`."""
    return sorted(registry.own_files(registry.METRIC))


def of_file(name: str) -> Callable[..., Any] | None:
    """The function of a metric in such a folder, whose file is run; None where there is none of that name.

    Raises:
        LuthierError: the file cannot be run, or has no function of its name.
    """
    path = registry.own_files(registry.METRIC).get(name)
    if path is None:
        return None
    module = registry.module_at(path, f"{_MODULES}.{name}", "a metric")
    function = getattr(module, name, None)
    if not callable(function):
        raise LuthierError(f"`{path.name}` must define a function `{name}`", where=str(path), fix=_RIGHT)
    found: Callable[..., Any] = function
    return found


def name_of(function: Callable[..., Any]) -> str:
    """What reports call a function."""
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")


def meaning_of(function: Callable[..., Any]) -> str:
    """The first sentence of its docstring."""
    return (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ").rstrip(".") or "a metric of your own"


def identity(function: Callable[..., Any]) -> str:
    """Identifies a function's code: that of the file of a metric, of a function in Python its own."""
    try:
        if str(getattr(function, "__module__", "")).startswith(f"{_MODULES}."):
            return disk.sha256(Path(inspect.getfile(function)))
        text = inspect.getsource(function)
    except (OSError, TypeError):
        # What was typed in, or made by a call, has no source.
        text = name_of(function)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def options_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The keyword-only parameters of a function, as the registry reads the options of a technique."""
    wanted = [one for one in _parameters(function) if one.kind is inspect.Parameter.KEYWORD_ONLY]

    def options(**given: Any) -> dict[str, Any]:
        return given

    try:
        hints = get_type_hints(function)
    # Whatever a type names that is not there, the option is then of any type.
    except Exception:
        hints = {}
    options.__signature__ = inspect.Signature(wanted)  # type: ignore[attr-defined]
    options.__annotations__ = {one.name: hints.get(one.name, Any) for one in wanted}
    return options


def scoring_of(function: Callable[..., Any], name: str, options: Mapping[str, Any], where: str) -> Scoring:
    """How a function scores answers.

    Args:
        function: takes an answer and its row, or all of them.
        name: what errors call it.
        options: for its keyword-only parameters, checked.
        where: for errors.

    Raises:
        LuthierError: it takes something else.
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [one for one in _parameters(function) if one.kind in positional]
    first = taken[0].name if taken else ""
    if len(taken) != 2 or first not in (ONE, ALL):
        said = ", ".join(one.name for one in taken) or "nothing"
        raise LuthierError(f"the metric `{name}` takes {said}", where=where, fix=_RIGHT)
    ready = partial(function, **options)
    return Scoring(of_answers=partial(_all_at_once if first == ALL else _one_by_one, ready, name))


def record_of(row: Row) -> dict[str, Any]:
    """A row as a metric of your own reads it, to do with as it likes: what stood in it, `answer` as a list of what is accepted."""
    return copy.deepcopy({"id": row.id, **row.columns, **row.fields})


def _one_by_one(function: Callable[..., Any], name: str, answers: Sequence[str], rows: Sequence[Row], say: Say) -> Scored:
    found = []
    for answer, row in zip(answers, rows, strict=True):
        value = _called(function, name, row.place, answer, record_of(row))
        found.append(_number(value, name, row, answer))
    return Scored(found)


def _all_at_once(function: Callable[..., Any], name: str, answers: Sequence[str], rows: Sequence[Row], say: Say) -> Scored:
    value = _called(function, name, f"{len(rows)} answers", list(answers), [record_of(row) for row in rows])
    # Arrays and tensors have it, on whatever device.
    value = value.tolist() if callable(getattr(value, "tolist", None)) else value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        what = f"the metric `{name}` gives {cut_short(repr(value))} for {len(rows)} answers"
        raise LuthierError(what, where=f"{len(rows)} answers", fix="return a list, one number for each answer, in their order")
    if len(value) != len(rows):
        row = rows[min(len(value), len(rows) - 1)]
        what = f"the metric `{name}` gives {len(value)} numbers for {len(rows)} answers"
        where = f"{row.place}, " + ("the first without one" if len(value) < len(rows) else "the last answer")
        raise LuthierError(what, where=where, fix="return a list, one number for each answer, in their order")
    return Scored([_number(one, name, row, answer) for one, row, answer in zip(value, rows, answers, strict=True)])


def _called(function: Callable[..., Any], name: str, where: str, *given: Any) -> Any:
    try:
        return function(*given)
    except LuthierError:
        raise
    except Exception as error:
        # The line of the user's function: the first frame below this one.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        place = f"; {frames[0].filename}, line {frames[0].lineno}" if frames else ""
        what = f"the metric `{name}` cannot score this: {type(error).__name__}: {error}"
        raise LuthierError(what, where=where + place, fix="fix the metric, so that it has a number for every answer") from error


def _number(value: Any, name: str, row: Row, answer: str) -> float:
    """A score as a number.

    Raises:
        LuthierError: it is none, with the row that it is for.
    """
    value = value.item() if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0 else value
    number = float(value) if isinstance(value, numbers.Real | numpy.bool_) else math.nan
    if not math.isfinite(number):
        what = f"the metric `{name}` gives {cut_short(repr(value))} for the answer {cut_short(repr(answer))}"
        raise LuthierError(what, where=row.place, fix="return a finite number, from 0 to 1 for a share")
    return number


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        # Some functions written in C tell nothing about themselves.
        return []
