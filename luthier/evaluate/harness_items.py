"""What the evaluation harness tells of each item, as luthier keeps it: a task's main metric, items with prompts and answers, all values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from luthier.errors import LuthierError
from luthier.evaluate.items import Item
from luthier.evaluate.paired import value_of
from luthier.rows.shapes import Row

FIRST, NAMED = "the first of the task's metrics that is a mean over items", "named by the recipe"
_MEAN, _PERPLEXITY, _WEIGHTED, _BITS = "mean", "perplexity", "weighted_perplexity", "bits_per_byte"
"""How a task's items become its value, where that is a mean of something."""
_PER_CHARACTER = ("acc_norm", "acc_bytes")


class Main(NamedTuple):
    """The metric of a task that is compared before and after."""

    metric: str
    filter: str
    """Which of the task's ways to take an answer out of a text."""
    how: str
    higher_is_better: bool
    chosen: str
    """Why this one, in words."""

    @property
    def key(self) -> str:
        """As the harness writes it: `exact_match,strict-match`."""
        return f"{self.metric},{self.filter}"

    def check(self, items: Sequence[Item], values: Mapping[str, float]) -> None:
        """Refuse items whose mean is not what the harness tells.

        Raises:
            LuthierError: it is not.
        """
        mean, told = value_of(self.key, items), values.get(self.key)
        if told is None or not math.isclose(mean, told, rel_tol=1e-6, abs_tol=1e-9):
            what = f"the items' `{self.key}` come to {mean:g}, and the harness tells {told}"
            raise LuthierError(what, fix="name another metric of the task: metric: NAME")


def main_of(tasks: Mapping[str, Any], group: Any, wanted: Any, where: str) -> Main:
    """The main metric: the one that is named, else the first that is a mean over items, by the first of the task's filters.

    Args:
        tasks: the harness's, by name; those of a group have the metrics that the group names.
        group: the harness's, where the tasks have a value together.
        wanted: `METRIC` or `METRIC,FILTER`; None: none is named.
        where: for errors.

    Raises:
        LuthierError: there is no such metric, or its value is no mean over items.
    """
    first = next(iter(tasks.values()))
    filters = [str(one.name) for one in getattr(first, "_filters", ())] or ["none"]
    if group is None:
        keys = [(metric, each) for metric in _metrics(first) for each in filters]
    else:
        keys = [(one.metric, each) for one in group.aggregate_metric_list for each in _listed(one.filter_list, filters)]
    means = {
        key: _how(first, key[0]) for key in keys if _how(first, key[0]) and all(key[0] in _metrics(one) for one in tasks.values())
    }
    known = ", ".join(",".join(key) for key in means) or "none"
    if wanted is None and not means:
        what = f"no metric of {', '.join(tasks)} is a mean over items, which a paired test needs"
        raise LuthierError(what, where=where, fix="name another task")
    if wanted is not None and not isinstance(wanted, str):
        raise LuthierError("tasks bring their own metrics", where=f"{where}.metric", fix=f"name one of: {known}")
    chosen = (
        next(iter(means), ("", "")) if wanted is None else next((key for key in keys if wanted in (key[0], ",".join(key))), None)
    )
    if chosen is None or chosen not in means:
        what = (
            f"there is no metric `{wanted}` here"
            if chosen is None
            else f"`{wanted}` is no mean over items, which a paired test needs"
        )
        raise LuthierError(what, where=f"{where}.metric", fix=f"name one of: {known}")
    higher = first.higher_is_better().get(chosen[0])
    return Main(*chosen, means[chosen], bool(higher is None or higher), FIRST if wanted is None else NAMED)


def _metrics(task: Any) -> list[str]:
    return [str(name) for name in task.aggregation()]


def _listed(given: Any, otherwise: Sequence[str]) -> list[str]:
    return list(otherwise) if given is None else [given] if isinstance(given, str) else list(given)


def _how(task: Any, metric: str) -> str:
    """How the items' numbers become the value; empty where that is no mean."""
    from lm_eval.api import metrics

    known = {
        metrics.mean: _MEAN,
        metrics.perplexity: _PERPLEXITY,
        metrics.weighted_perplexity: _WEIGHTED,
        metrics.bits_per_byte: _BITS,
    }
    return known.get(task.aggregation().get(metric), "")


def items_of(
    main: Main, tasks: Mapping[str, tuple[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]], equal: bool
) -> list[Item]:
    """What the harness tells of each document, as items.

    Args:
        main: the metric.
        tasks: by name, what they ask of a model, and the harness's.
        samples: by task, what it logged under the main metric's filter.
        equal: each task counts the same, whatever its size.

    Raises:
        LuthierError: a document has no number under the metric.
    """
    total = sum(map(len, samples.values()))
    return [
        _item(main, name, *tasks[name], one, total / (len(samples) * len(each)) if equal else 1.0)
        for name, each in samples.items()
        for one in each
    ]


def _item(main: Main, name: str, output: str, task: Any, one: Mapping[str, Any], share: float) -> Item:
    place = f"{name}/{one['doc_id']}"
    score, weight = _score(main, one.get(main.metric), place)
    prompt, expected, answer, note = _texts(main, output, task, one)
    return Item(place, prompt, expected, answer, score, weight * share, note=note)


def _score(main: Main, value: Any, place: str) -> tuple[float, float]:
    """An item's number and its weight in the mean: that of a perplexity is in nats, e to whose mean it is."""
    try:
        if main.how in (_WEIGHTED, _BITS):
            likelihood, size = map(float, value)
            return -likelihood / size / (math.log(2) if main.how == _BITS else 1.0), size
        return (-float(value) if main.how == _PERPLEXITY else float(value)), 1.0
    except (TypeError, ValueError, ZeroDivisionError) as error:
        what = f"`{main.metric}` of this item is {value!r}, and no number"
        raise LuthierError(what, where=place, fix="name another metric of the task: metric: NAME") from error


def _texts(main: Main, output: str, task: Any, one: Mapping[str, Any]) -> tuple[str, str | list[str], str, str]:
    """An item's prompt as it was asked, what was expected, the answer, and what the task took from it."""
    arguments = one["arguments"]
    if output == "loglikelihood_rolling":
        return str(arguments[0][0]), "", "", ""
    if output == "generate_until":
        said, taken = str(one["resps"][0][0]), one["filtered_resps"][0]
        note = "" if taken == said or not isinstance(taken, str) else f"counted as: {taken}"
        # A task that judges by code of its own may have no right answer.
        return str(arguments[0][0]), "" if callable(task.get_config("process_results")) else _target(task, one), said, note
    if output == "multiple_choice":
        inputs = [str(context) for context, _ in arguments]
        several = len(set(inputs)) > 1 and bool(getattr(task, "multiple_input", 0))
        choices = inputs if several else [str(choice) for choice in task.doc_to_choice(one["doc"])]
        likelihood = numpy.array([float(found[0]) for found in one["filtered_resps"][: len(choices)]])
        sizes = numpy.array([float(len(choice.encode() if main.metric == "acc_bytes" else choice)) for choice in choices])
        best = int((likelihood / sizes if main.metric in _PER_CHARACTER else likelihood).argmax())
        right = task.doc_to_text(one["doc"]) if several else one["target"]
        named = [choices[each] for each in _places(right, choices)]
        prompt = str(arguments[0][1]).strip() if several else inputs[0]
        return prompt, named[0] if len(named) == 1 else named, choices[best], ""
    return str(arguments[0][0]), str(arguments[0][1]), "", ""


def _places(right: Any, choices: Sequence[str]) -> list[int]:
    """The right choices' places."""
    each = right if isinstance(right, list) else [right]
    places = [choices.index(one) if isinstance(one, str) and one in choices else one for one in each]
    return [one for one in places if isinstance(one, int) and 0 <= one < len(choices)]


def _target(task: Any, one: Mapping[str, Any]) -> str | list[str]:
    target = one["target"]
    if isinstance(target, list):
        return [str(each) for each in target]
    if isinstance(target, int) and task.get_config("doc_to_choice") is not None:
        return str(task.doc_to_choice(one["doc"])[target])
    return str(target)


def asked_of(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Any]:
    """All that the model was asked, as plain data."""
    asked: list[Any] = json.loads(
        json.dumps([[name, one["doc_id"], one["arguments"]] for name, each in samples.items() for one in each], default=str)
    )
    return asked


def values_of(results: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """All values of tasks and groups, by name and by `METRIC,FILTER`."""
    return {
        name: {
            key: float(value)
            for key, value in results[name].items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float | numpy.number)
        }
        for name in names
        if name in results
    }


def row_of(name: str, task: Any, number: int, doc: Any) -> Row:
    """A document as a row: its question in the task's words, without examples before it, and its right answer."""
    output = str(task.get_config("output_type") or task.OUTPUT_TYPE)
    place, where = f"{name}/{number}", f"{name}, item {number}"
    if output == "loglikelihood_rolling":
        return Row(place, "text", {"text": str(task.doc_to_target(doc))}, where)
    asked, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = [str(one) for one in task.doc_to_choice(doc)] if output == "multiple_choice" else []
    if isinstance(asked, int):
        return Row(place, "prompt+answer", {"prompt": choices[asked], "answer": [str(target)]}, where)
    named = [choices[each] for each in _places(target, choices)] if choices else [str(one) for one in _each(target)]
    answers = [one for one in named if one.strip()]
    shape = "prompt+answer" if answers else "prompt"
    return Row(place, shape, {"prompt": str(asked), **({"answer": answers} if answers else {})}, where)


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
