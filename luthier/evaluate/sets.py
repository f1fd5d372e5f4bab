"""Evaluation sets: rows, a metric and a role, and what a model reaches on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast, get_args

import numpy
from transformers import PreTrainedTokenizerBase

from luthier.errors import LuthierError, Say, silent
from luthier.evaluate import by_head
from luthier.evaluate.answered import answered
from luthier.evaluate.choose import Chosen, choose, metric_of
from luthier.evaluate.intervals import FEWEST, Interval, bootstrap, resampled, wilson
from luthier.evaluate.items import Item, accepted_answers, is_binary, numbers_of, prompt_text, weigh_alike
from luthier.evaluate.likelihood import encode_choices, likelihoods, most_likely
from luthier.evaluate.metrics import METRICS, NEEDED_SHAPES, Metric
from luthier.evaluate.paired import statistic_of, value_of
from luthier.evaluate.readings import check_read, places_of, readings, readings_by_row, row_head_of
from luthier.evaluate.scoring import ScoringError
from luthier.generation.generate import BATCH_TOKENS, generate
from luthier.models.head import head_of
from luthier.rows import function_calls
from luthier.rows.chat import form_of
from luthier.rows.encode import Encoded, counted, encode, told
from luthier.rows.groups import PAIR
from luthier.rows.shapes import Row
from luthier.training.readout import MEAN, Combination
from luthier.tune import Tune

Role = Literal["target", "retention"]

OF_TEXTS = ("class", "value", "vector", "tags")
"""What a head says of texts, for which no token is predicted."""
_NEEDED_WITHOUT_ANSWER = "a `prompt`, or a `text` to go on from"


@dataclass(frozen=True)
class EvalSet:
    """Rows to measure a model on.

    Args:
        name: what reports call it.
        rows: read rows, all of a shape the metric can score.
        metric: one of `METRICS`, `{name: options}`, a function of your own or a chosen one; None: what `default_metric` chooses.
        role: `target`: what training should teach; `retention`: what it should leave alone.
        max_new_tokens: the longest answer that is generated.
        limit: use only this many rows, from the start.
        combination: how the scores of a reward model's members become one; None: their mean.
        encoding: options of `luthier.rows.encode.encode` for rows whose likelihood is measured; none: all answers, uncut.

    Raises:
        LuthierError: there are no rows, the metric is not known, a row is not of the shape it needs, or there are no scores to combine.
    """

    name: str
    rows: Sequence[Row]
    metric: str | Mapping[str, Any] | Callable[..., Any] | Chosen | None = None
    role: Role = "target"
    max_new_tokens: int = 48
    limit: int | None = None
    combination: Combination | None = None
    encoding: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        place = f"evaluation set `{self.name}`"
        if not self.used:
            raise LuthierError("the set has no rows", where=place, fix="add rows, or remove the set")
        if self.role not in get_args(Role):
            raise LuthierError(f"the role is `{self.role}`", where=place, fix="write target or retention")
        for row in self.used:
            _check_shape(row, self.chosen, place)
        if self.combination is not None and self.known.needs != "score":
            raise LuthierError(
                f"`{self.combination.how}` combines scores of a reward model's members, and `{self.chosen_metric}` measures none",
                where=place,
                fix="leave `combine` and `deviations` out, or use the metric scored",
            )

    @property
    def used(self) -> Sequence[Row]:
        """The rows within the limit."""
        return self.rows if self.limit is None else self.rows[: self.limit]

    @cached_property
    def chosen(self) -> Chosen:
        """The metric, ready to score; one that asks a judge counts what it asked of it."""
        return choose(default_metric(self.used) if self.metric is None else self.metric, f"evaluation set `{self.name}`")

    @property
    def chosen_metric(self) -> str:
        """The metric, by name."""
        return self.chosen.name

    @property
    def known(self) -> Metric:
        """What is known of the metric."""
        return self.chosen.metric


@dataclass(frozen=True)
class SetResult:
    """What a model reaches on one set.

    Args:
        name: the set's.
        metric: one of `METRICS`.
        role: as in `EvalSet`.
        value: the weighted mean of the items' scores; for perplexity, e to its power.
        interval: 95 % interval of the value; None where there are too few items to tell.
        n: items.
        asked: SHA-256 of the token ids and decoding settings the model was given: equal for equal questions.
        items: every row that has a score, in the set's order.
        told: what reports tell of the metric beside its name: its `options`, for one of your own whether `higher_is_better`, the `judge`
            and what it took, and the answers that are `unscored`.
    """

    name: str
    metric: str
    role: Role
    value: float
    interval: Interval | None
    n: int
    asked: str
    items: tuple[Item, ...]
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> Metric:
        """What is known of the metric."""
        return metric_of(self.metric, higher_is_better=bool(self.told.get("higher_is_better", True)))

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better."""
        return self.known.higher_is_better

    @property
    def chosen_metric(self) -> str:
        """The metric, by name."""
        return self.metric

    def as_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes an equal result."""
        plain = asdict(self)
        items = [{key: value for key, value in one._asdict().items() if value or key not in _OF_SETS} for one in self.items]
        plain |= {"higher_is_better": self.higher_is_better, "items": items}
        return {key: value for key, value in plain.items() if value or key != "told"}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> SetResult:
        """What `as_json` wrote."""
        fields = {key: value for key, value in plain.items() if key != "higher_is_better"}
        interval = None if plain["interval"] is None else cast(Interval, tuple(plain["interval"]))
        items = tuple(Item(**one)._replace(**_of_set(one)) for one in plain["items"])
        return SetResult(**{**fields, "interval": interval, "items": items})


_OF_SETS = ("numbers", "counts", "note")
"""What items have where their set's value is no mean, of classes, and where something was said of the answer."""


def _of_set(plain: Mapping[str, Any]) -> dict[str, Any]:
    """That of an item, as it was before it became JSON."""
    counts = {name: tuple(some) for name, some in plain.get("counts", {}).items()}
    return {"numbers": tuple(plain.get("numbers", ())), "counts": counts}


def default_metric(rows: Sequence[Row]) -> str:
    """The metric for rows of a shape: `choice` for multiple choice, `contains` for prompts with answers, `preference_accuracy` for two
    answers of which one is better, `perplexity` for documents, `entity_f1` for labels of words, `tool_calls` where tools are offered and
    the right calls are told, else `loss`."""
    if rows[0].fields.get("tools") and any(map(function_calls.can_match, accepted_answers(rows[0]))):
        return "tool_calls"
    by_shape = {
        "prompt+choices+answer": "choice",
        "prompt+answer": "contains",
        PAIR: "preference_accuracy",
        "text": "perplexity",
        "text+tags": "entity_f1",
    }
    return by_shape.get(rows[0].shape, "loss")


def measure(
    tune: Tune,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[EvalSet],
    *,
    say: Say = silent,
    batch_tokens: int = BATCH_TOKENS,
    unscored: Callable[[LuthierError], None] | None = None,
) -> dict[str, SetResult]:
    """Measure a model on sets, by name in their order. Answers are greedy, so the same model gives the same result.

    Args:
        tune: the model, with what is attached to it; within `tune.at("base")`, the base.
        tokenizer: its tokenizer.
        sets: what to measure.
        say: hears of each set.
        batch_tokens: the most tokens of one batch.
        unscored: hears of a set whose answers could not be scored, which is then left out; None: that is an error as well.

    Raises:
        LuthierError: a row is longer than the model's context, or the model gives numbers that are not finite.
    """
    found = {}
    for one in sets:
        say(f"measuring {one.name}: {one.chosen_metric} of {len(one.used)} rows")
        try:
            with _placed(one):
                items, asked, told = _measured(tune, tokenizer, one, batch_tokens, say)
        except LuthierError as problem:
            if unscored is None or not isinstance(problem.__cause__, ScoringError):
                raise
            unscored(problem)
            continue
        found[one.name] = replace(result_of(one, items, _hash(one.chosen.asked(asked))), told=told)
    return found


def _measured(
    tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int, say: Say
) -> tuple[list[Item], Any, dict[str, Any]]:
    """A set's items, what the model was asked, and what reports tell beside them."""
    if one.chosen.task is not None:
        return one.chosen.task.measured(tune, tokenizer, one.used, batch_tokens=batch_tokens)
    if one.known.needs != "generation":
        return *_MEASURES[one.known.needs](tune, tokenizer, one, batch_tokens), {}
    answers, asked = _answered(tune, tokenizer, one, batch_tokens)
    items, told = answered(one.chosen, answers, one.used, say)
    return items, asked, told


def check(tune: Tune, tokenizer: PreTrainedTokenizerBase, sets: Sequence[EvalSet], known: Collection[str] = ()) -> list[str]:
    """Find what would stop `measure`, without running the model: a run should stop before it trains, not behind it.

    Args:
        tune: the model.
        tokenizer: its tokenizer.
        sets: what will be measured.
        known: notes that are said of the training rows already.

    Returns:
        What deserves a warning in the sets' rows.

    Raises:
        LuthierError: a row cannot be written as the model reads it, is too long, or the model predicts no tokens.
    """
    said: list[str] = []
    for one in sets:
        with _placed(one):
            needs = one.known.needs
            if one.chosen.task is not None:
                one.chosen.task.check(tune, tokenizer)
                continue
            if needs not in OF_TEXTS:
                head_of(tune.model, tune.parts)
            notes, first = counted(_ASKED[needs](tune, tokenizer, one))
        new = {note: count for note, count in notes.items() if note not in known}
        said += [f"evaluation set `{one.name}`: {note}" for note in told(new, first)]
    return said


@contextmanager
def _placed(one: EvalSet) -> Iterator[None]:
    """Name the set in errors about its rows."""
    try:
        yield
    except LuthierError as problem:
        where = f"evaluation set `{one.name}`" + (f", {problem.where}" if problem.where else "")
        raise LuthierError(problem.what, where=where, fix=problem.fix) from problem


def result_of(one: EvalSet | SetResult, items: Sequence[Item], asked: str) -> SetResult:
    """Sum a set's items up."""
    metric, statistic = one.chosen_metric, statistic_of(one.chosen_metric)
    value = value_of(metric, items)
    of_set = one.known.of_set
    if of_set is not None:
        numbers_NM = numbers_of(items)
        several = len(items) >= FEWEST
        interval = resampled(lambda chosen_N: of_set(numbers_NM[chosen_N]), rows=len(items)) if several else None
        return SetResult(one.name, metric, one.role, value, interval, len(items), asked, tuple(items))
    score_N = numpy.array([item.score for item in items])
    weight_N = numpy.array([item.weight for item in items])
    interval = None
    if is_binary(items) and weigh_alike(items) and one.known.higher_is_better:
        interval = wilson(int(score_N.sum()), len(items))
    elif len(items) >= FEWEST:
        interval = bootstrap(score_N[None], weight_N, lambda mean_MS: statistic(mean_MS[0]))
    return SetResult(one.name, metric, one.role, value, interval, len(items), asked, tuple(items))


def _answered(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[str], Any]:
    prompts = [row.token_ids for row in _prompts(tune, tokenizer, one)]
    answers = generate(tune, tokenizer, prompts, max_new_tokens=one.max_new_tokens, batch_tokens=batch_tokens)
    return answers, [prompts, one.max_new_tokens]


def _chosen(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[Item], Any]:
    per_byte = one.chosen_metric == "choice_normalized"
    flat = _choices(tune, tokenizer, one)
    found = iter(likelihoods(tune, flat, batch_tokens=batch_tokens))
    items = []
    for row in one.used:
        choices, right = row.fields["choices"], row.fields["answer"]
        best = most_likely(choices, [next(found) for _ in choices], per_byte=per_byte)
        items.append(Item(row.id, prompt_text(row), choices[right], choices[best], float(best == right)))
    return items, [(choice.token_ids, choice.supervised) for choice in flat]


def _preferred(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[Item], Any]:
    per_token = one.chosen_metric == "preference_accuracy_normalized"
    flat = _pairs(tune, tokenizer, one)
    found = likelihoods(tune, flat, batch_tokens=batch_tokens)
    likely = [-each.nats / (each.targets if per_token else 1) for each in found]
    return by_head.paired(one.used, likely), [(answer.token_ids, answer.supervised) for answer in flat]


def _classified(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[Item], Any]:
    head, rows = row_head_of(tune), _read(tune, tokenizer, one)
    return by_head.classified(head, one.used, readings_by_row(tune, rows, batch_tokens=batch_tokens)), _ids(rows)


def _valued(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[Item], Any]:
    rows = _read(tune, tokenizer, one)
    return by_head.valued(one.used, readings_by_row(tune, rows, batch_tokens=batch_tokens)), _ids(rows)


def _scored(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[Item], Any]:
    flat, how = _pairs(tune, tokenizer, one), one.combination or MEAN
    found = readings_by_row(tune, flat, batch_tokens=batch_tokens)
    return by_head.scored(one.used, found, how, row_head_of(tune)), [how, _ids(flat)]


def _tagged(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[Item], Any]:
    head, rows = row_head_of(tune), _read(tune, tokenizer, one)
    found = readings_by_row(tune, rows, batch_tokens=batch_tokens)
    entities = one.known.of_set is not None
    return by_head.tagged(head, one.used, rows, found, entities=entities), _ids(rows)


def _found(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[Item], Any]:
    members = [row.fields["members"] for row in one.used]
    rows = _read(tune, tokenizer, one)
    ranks = places_of(readings(tune, rows, batch_tokens=batch_tokens), [len(some) for some in members])
    return by_head.placed(one.chosen_metric, one.used, ranks), _ids(rows)


def _ids(rows: Sequence[Encoded]) -> list[tuple[int, ...]]:
    return [row.token_ids for row in rows]


def _read(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet) -> list[Encoded]:
    row_head_of(tune)
    form = form_of(tokenizer)
    encoded = [encode(row, tokenizer, purpose="read", form=form, **one.encoding).group for row in one.used]
    for row, group in zip(one.used, encoded, strict=True):
        for ids in group:
            check_read(tune, tokenizer, row, ids.token_ids)
    return [ids for group in encoded for ids in group]


def _likely(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet, batch_tokens: int) -> tuple[list[Item], Any]:
    encoded = _texts(tune, tokenizer, one)
    items = [
        Item(row.id, prompt_text(row), "", "", found.nats / found.targets, float(found.targets))
        for row, found in zip(one.used, likelihoods(tune, encoded, batch_tokens=batch_tokens), strict=True)
    ]
    return items, [(ids.token_ids, ids.supervised) for ids in encoded]


def _prompts(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet) -> list[Encoded]:
    form = form_of(tokenizer)
    prompts = [encode(row, tokenizer, purpose="prompt", form=form) for row in one.used]
    for row, prompt in zip(one.used, prompts, strict=True):
        check_read(tune, tokenizer, row, prompt.token_ids, one.max_new_tokens)
    return prompts


def _choices(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet) -> list[Encoded]:
    form = form_of(tokenizer)
    encoded = [encode_choices(row, tokenizer, form) for row in one.used]
    for row, choices in zip(one.used, encoded, strict=True):
        for choice in choices:
            check_read(tune, tokenizer, row, choice.token_ids)
    return [choice for choices in encoded for choice in choices]


def _pairs(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet) -> list[Encoded]:
    form = form_of(tokenizer)
    encoded = [encode(row, tokenizer, form=form, **one.encoding).group for row in one.used]
    for row, pair in zip(one.used, encoded, strict=True):
        for answer in pair:
            _check_target(row, answer)
            check_read(tune, tokenizer, row, answer.token_ids)
    return [answer for pair in encoded for answer in pair]


def _texts(tune: Tune, tokenizer: PreTrainedTokenizerBase, one: EvalSet) -> list[Encoded]:
    form = form_of(tokenizer)
    encoded = [encode(row, tokenizer, form=form, **one.encoding) for row in one.used]
    for row, ids in zip(one.used, encoded, strict=True):
        _check_target(row, ids)
        check_read(tune, tokenizer, row, ids.token_ids)
    return encoded


_ASKED: Mapping[str, Callable[[Tune, PreTrainedTokenizerBase, EvalSet], list[Encoded]]] = {
    "generation": _prompts,
    "choice": _choices,
    "pair": _pairs,
    "score": _pairs,
    "class": _read,
    "value": _read,
    "vector": _read,
    "tags": _read,
    "likelihood": _texts,
}
_MEASURES: Mapping[str, Callable[[Tune, PreTrainedTokenizerBase, EvalSet, int], tuple[list[Item], Any]]] = {
    "choice": _chosen,
    "pair": _preferred,
    "score": _scored,
    "class": _classified,
    "value": _valued,
    "vector": _found,
    "tags": _tagged,
    "likelihood": _likely,
}


def _check_shape(row: Row, chosen: Chosen, place: str) -> None:
    place = f"{place}, {row.place}"
    metric, known = chosen.name, chosen.metric
    if not fits(row, known):
        needed = NEEDED_SHAPES[known.needs] if known.compares else _NEEDED_WITHOUT_ANSWER
        fitting = ", ".join(name for name, one in METRICS.items() if fits(row, one))
        raise LuthierError(
            f"`{metric}` needs rows with {needed}, and this row is `{row.shape}`",
            where=place,
            fix="change the row" + (f", or use another metric: {fitting}" if fitting else ""),
        )
    if known.needs == "generation" and known.compares:
        if not all(one.strip() for one in accepted_answers(row)):
            raise LuthierError(
                "an accepted answer is empty, and a model that says nothing would be right",
                where=place,
                fix="give the answer as text (a call as JSON, with the metric tool_call), or measure the loss",
            )
        unreadable = next((one for one in accepted_answers(row) if not chosen.scoring.readable(one)), None)
        if unreadable is not None:
            raise LuthierError(
                f"no answer could ever equal `{unreadable}`: `{metric}` measures the {known.meaning}",
                where=place,
                fix="change the accepted answer, or use another metric",
            )


_SHAPES = {
    "choice": "prompt+choices+answer",
    "pair": PAIR,
    "score": PAIR,
    "class": "text+label",
    "value": "text+label",
    "vector": "members",
    "tags": "text+tags",
}


def fits(row: Row, metric: Metric) -> bool:
    """Whether a metric can measure a row."""
    answered = bool(accepted_answers(row))
    if metric.needs == "task":
        return True
    if metric.needs in _SHAPES:
        return row.shape == _SHAPES[metric.needs] and (metric.needs != "value" or isinstance(row.fields["label"], int | float))
    if metric.needs == "likelihood":
        return answered or row.shape in ("text", "messages")
    return row.shape != "prompt+choices+answer" and (
        answered or (not metric.compares and row.shape in ("prompt", "messages", "text"))
    )


def _check_target(row: Row, encoded: Encoded) -> None:
    if not any(encoded.supervised):
        reasons = "; ".join(encoded.notes) or "it is a single token"
        raise LuthierError(f"the row has no token to predict: {reasons}", where=row.place, fix="change the row")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
