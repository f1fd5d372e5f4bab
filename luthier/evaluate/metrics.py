"""Metrics: what is measured on a set of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from luthier.evaluate import json_metrics
from luthier.evaluate.intervals import Numbers
from luthier.evaluate.judge import judge
from luthier.evaluate.scoring import Scoring
from luthier.evaluate.statistics import BINS, auroc, average_precision, calibration_error, entity_f1, macro_f1, micro_f1
from luthier.rows import function_calls
from luthier.rows.answers import (
    RUN,
    WINDOW,
    Score,
    call_of,
    contains,
    equal,
    exact_match,
    last_number,
    last_number_of,
    repetition,
    token_f1,
    tool_call,
    type_token_ratio,
)
from luthier.rows.function_calls import tool_calls
from luthier.rows.json_answers import can_match, json_key_accuracy, json_match
from luthier.rows.rouge import rouge_1, rouge_2, rouge_l


class Metric(NamedTuple):
    """What a metric is."""

    needs: Literal["generation", "choice", "pair", "likelihood", "class", "value", "score", "vector", "tags", "task"]
    """Generated answers, the likelihoods of given choices, of a chosen and a rejected answer, or of the row's own text; or what a head
    says: a class, a number, the scores of two answers, vectors, tags of words; or what a task of the evaluation harness asks for."""
    higher_is_better: bool
    meaning: str
    score: Score | None = None
    """How a generated answer is scored."""
    compares: bool = True
    """Whether there must be an accepted answer to compare with."""
    readable: Callable[[str], bool] = lambda text: True
    """Whether an answer can be an accepted one: one that cannot would count every answer as wrong."""
    of_set: Callable[[Numbers], float] | None = None
    """From the items' numbers [N, M] to the value, where that is no mean of their scores."""
    make: Callable[..., Scoring] | None = None
    """From options to how answers are scored, where a metric has options."""


METRICS: Mapping[str, Metric] = {
    "exact_match": Metric("generation", True, "share of answers that are an accepted one", exact_match),
    "f1": Metric("generation", True, "mean overlap of words with an accepted answer", token_f1),
    "contains": Metric("generation", True, "share of answers in which an accepted one stands", contains),
    "equal": Metric("generation", True, "share of answers that are an accepted one letter for letter", equal),
    "last_number": Metric(
        "generation",
        True,
        "share of answers whose last number is right",
        last_number,
        readable=lambda one: last_number_of(one) is not None,
    ),
    "tool_call": Metric(
        "generation",
        True,
        "share of answers that are the right tool call",
        tool_call,
        readable=lambda one: call_of(one) is not None,
    ),
    "tool_calls": Metric(
        "generation",
        True,
        "share of answers whose tool calls are the right ones, by lists of right values",
        tool_calls,
        readable=function_calls.can_match,
    ),
    "json_match": Metric(
        "generation",
        True,
        "share of answers that are JSON and equal an accepted one",
        json_match,
        readable=can_match,
        make=json_metrics.json_match,
    ),
    "json_key_accuracy": Metric(
        "generation",
        True,
        "mean share of keys under which an answer, as JSON, holds what is right",
        json_key_accuracy,
        readable=can_match,
        make=json_metrics.json_key_accuracy,
    ),
    "rouge_1": Metric("generation", True, "mean ROUGE-1, F1 of words shared with an accepted answer", rouge_1),
    "rouge_2": Metric("generation", True, "mean ROUGE-2, F1 of pairs of words shared with an accepted answer", rouge_2),
    "rouge_l": Metric("generation", True, "mean ROUGE-L, F1 of the longest common sequence of words", rouge_l),
    "judge": Metric("generation", True, "mean score that another language model gives by a rubric", compares=False, make=judge),
    "type_token_ratio": Metric(
        "generation", True, f"mean share of distinct words among an answer's first {WINDOW}", type_token_ratio, compares=False
    ),
    "repetition": Metric(
        "generation", False, f"mean share of an answer's runs of {RUN} words that came before", repetition, compares=False
    ),
    "choice": Metric("choice", True, "share of items whose most likely choice is right"),
    "choice_normalized": Metric("choice", True, "share of items whose most likely choice, per byte, is right"),
    "preference_accuracy": Metric(
        "pair", True, "share of pairs whose chosen answer is likelier than the rejected one, a tie being a half"
    ),
    "preference_accuracy_normalized": Metric(
        "pair", True, "share of pairs whose chosen answer is likelier a token, a tie being a half"
    ),
    "accuracy": Metric("class", True, "share of texts whose class, or all of whose labels, a head tells rightly"),
    "macro_f1": Metric("class", True, "mean over classes of 2 TP / (2 TP + FP + FN), as a head tells them", of_set=macro_f1),
    "micro_f1": Metric("class", True, "2 TP / (2 TP + FP + FN) over all classes together, as a head tells them", of_set=micro_f1),
    "auroc": Metric(
        "class", True, "area under the ROC curve of a head's probabilities, each class against the others, a mean", of_set=auroc
    ),
    "average_precision": Metric(
        "class",
        True,
        "mean precision at each text of a class by a head's probability, a mean over classes",
        of_set=average_precision,
    ),
    "expected_calibration_error": Metric(
        "class", False, f"expected calibration error of a head's probabilities, in {BINS} bins", of_set=calibration_error
    ),
    "entity_f1": Metric(
        "tags", True, "2 TP / (2 TP + FP + FN) of entities, right by name and both ends, as a head tags words", of_set=entity_f1
    ),
    "tag_accuracy": Metric("tags", True, "share of words whose tag a head tells rightly"),
    "mean_absolute_error": Metric("value", False, "mean distance of a head's number from the row's"),
    "reward_accuracy": Metric("score", True, "share of pairs whose chosen answer a head scores higher, a tie being a half"),
    "recall_at_1": Metric("vector", True, "share of questions whose text is nearest of all texts of the set"),
    "mean_reciprocal_rank": Metric("vector", True, "mean of one over the place of a question's text among all texts of the set"),
    "recall_at_10": Metric("vector", True, "share of questions whose text is among the ten nearest of all texts of the set"),
    "ndcg_at_10": Metric(
        "vector", True, "mean of 1 over the log of 1 + a question's text's place to the base 2, 0 behind the tenth"
    ),
    "loss": Metric("likelihood", False, "mean negative log-likelihood of a target token, in nats"),
    "perplexity": Metric("likelihood", False, "e to the power of the loss"),
}
"""Metrics by name. `choice` and `choice_normalized` are `acc` and `acc_norm` of the LM Evaluation Harness: the
log-likelihoods of a choice's tokens are summed, and in `choice_normalized` divided by its UTF-8 bytes."""

NEEDED_SHAPES: Mapping[str, str] = {
    "generation": "a `prompt` and an `answer`",
    "choice": "a `prompt`, `choices` and an `answer`",
    "pair": "a `prompt`, a `chosen` and a `rejected` answer",
    "score": "a `prompt`, a `chosen` and a `rejected` answer",
    "class": "a `text` and a `label`",
    "tags": "`tokens` and `tags`, or a `text` and `spans`",
    "value": "a `text` and a `label`, a number",
    "vector": "a `query` and a `positive` text",
    "likelihood": "a `text`, `messages`, or a `prompt` and a `completion`",
}
"""By what a metric needs, the rows that it is measured on."""
