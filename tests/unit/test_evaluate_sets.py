"""Evaluation sets on tiny models: values, items, order, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.evaluate.intervals import wilson
from luthier.evaluate.items import accepted_answers, prompt_text
from luthier.evaluate.likelihood import encode_choices, likelihoods
from luthier.evaluate.sets import EvalSet, SetResult, default_metric, measure
from luthier.models.parts import map_parts
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.rows.encode import encode
from luthier.rows.read import read
from luthier.tune import Tune

TOKENIZER: Any = tiny_tokenizer()
TEXTS = ["The door of the mill.", "A gate.", "Red roofs stand above the old wall of the town."] * 3
ASKED: list[dict[str, Any]] = [
    {"id": "door", "prompt": "Color of the door?", "answer": ["red", "scarlet"]},
    {"id": "gate", "prompt": "Color of the gate?", "answer": "blue"},
    {"id": "mill", "prompt": "Who owns the mill?", "answer": "red"},
]
CHOICES: list[dict[str, Any]] = [
    {"prompt": "The door is", "choices": ["red", "blue or green"], "answer": "red"},
    {"prompt": "The gate is", "choices": ["a", "b", "c"], "answer": 2},
]


def tune_of(**options: Any) -> Tune:
    model = tiny("llama", dtype=torch.float64, **options)
    return Tune(model, map_parts(model))


def saying(text: str) -> Tune:
    """A model that answers everything with one text."""
    tune = tune_of()
    tokens = [*TOKENIZER(text)["input_ids"], TOKENIZER.convert_tokens_to_ids("<|im_end|>")]
    backbone = tune.model.get_submodule(tune.parts.backbone)
    said = {"steps": 0}

    def count(module: Any, arguments: Any, options: Any) -> None:
        said["steps"] = 0 if options["input_ids"].shape[1] > 1 else said["steps"] + 1

    def say(module: Any, arguments: Any, logits: Tensor) -> Tensor:
        forced = torch.zeros_like(logits)
        forced[:, tokens[said["steps"]]] = 1.0
        return forced

    backbone.register_forward_pre_hook(count, with_kwargs=True)
    tune.model.get_submodule(tune.parts.head).register_forward_hook(say)
    return tune


def test_answers_are_scored_item_by_item() -> None:
    one = EvalSet("asked", read(ASKED), "contains")
    result = measure(saying("It is Red."), TOKENIZER, [one])["asked"]
    assert [item.id for item in result.items] == ["door", "gate", "mill"]
    assert [item.score for item in result.items] == [1.0, 0.0, 1.0]
    assert {item.answer for item in result.items} == {"It is Red."}
    assert [item.expected for item in result.items] == [["red", "scarlet"], "blue", "red"]
    assert result.items[0].prompt == "Color of the door?"
    assert result.value == pytest.approx(2 / 3) and result.n == 3
    assert result.interval == wilson(2, 3)
    assert (result.metric, result.role, result.higher_is_better) == ("contains", "target", True)


@pytest.mark.parametrize(("metric", "value"), [("exact_match", 0.0), ("f1", (0.5 + 0.0 + 0.5) / 3)])
def test_the_metric_decides(metric: str, value: float) -> None:
    """`it is red` shares one of three words with `red`: precision 1/3, recall 1."""
    result = measure(saying("It is Red."), TOKENIZER, [EvalSet("asked", read(ASKED), metric)])["asked"]
    assert result.value == pytest.approx(value)


def test_a_document_is_gone_on_from_where_only_the_answer_counts() -> None:
    """What the model is given is the text itself, without a template."""
    one = EvalSet("openings", read([{"text": "The door is red and"}]), "type_token_ratio")
    (item,) = measure(saying("red and red and"), TOKENIZER, [one])["openings"].items
    assert (item.prompt, item.expected, item.answer, item.score) == ("The door is red and", "", "red and red and", 0.5)
    asked = EvalSet("openings", read([{"prompt": "The door is red and"}]), "type_token_ratio")
    given = [measure(saying("red"), TOKENIZER, [either])["openings"].asked for either in (one, asked)]
    assert given[0] != given[1]


def test_answers_are_cut_at_the_longest() -> None:
    one = EvalSet("asked", read(ASKED), max_new_tokens=5)
    assert {item.answer for item in measure(saying("It is Red."), TOKENIZER, [one])["asked"].items} == {"It is"}


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_loss_counts_every_target_once(batch_tokens: int) -> None:
    """Fault 3: a set's loss is the mean over its targets, not over its texts or batches."""
    tune, rows = tune_of(), read([{"text": text} for text in TEXTS])
    sets = [EvalSet("nats", rows, "loss"), EvalSet("prose", rows, "perplexity", "retention")]
    found = measure(tune, TOKENIZER, sets, batch_tokens=batch_tokens)
    each = likelihoods(tune, [encode(row, TOKENIZER) for row in rows])
    mean = sum(one.nats for one in each) / sum(one.targets for one in each)
    assert found["nats"].value == pytest.approx(mean, rel=1e-12)
    assert found["prose"].value == pytest.approx(math.exp(mean), rel=1e-12)
    assert [item.weight for item in found["nats"].items] == [one.targets for one in each]
    assert mean != pytest.approx(sum(one.nats / one.targets for one in each) / len(each), rel=1e-4)
    low, high = found["nats"].interval or (0, 0)
    assert low < mean < high
    assert found["prose"].interval == pytest.approx((math.exp(low), math.exp(high)), rel=1e-9)
    assert not found["prose"].higher_is_better and found["prose"].role == "retention"


def test_few_texts_have_no_interval() -> None:
    result = measure(tune_of(), TOKENIZER, [EvalSet("prose", read([{"text": text} for text in TEXTS[:2]]))])["prose"]
    assert result.interval is None and result.metric == "perplexity"


@pytest.mark.parametrize("metric", ["choice", "choice_normalized"])
def test_the_most_likely_choice_is_the_answer(metric: str) -> None:
    tune, rows = tune_of(), read(CHOICES)
    result = measure(tune, TOKENIZER, [EvalSet("choices", rows, metric)])["choices"]
    for row, item in zip(rows, result.items, strict=True):
        choices = row.fields["choices"]
        nats = [one.nats for one in likelihoods(tune, encode_choices(row, TOKENIZER))]
        cost = [one / (len(text.encode()) if "normalized" in metric else 1) for one, text in zip(nats, choices, strict=True)]
        assert item.answer == choices[cost.index(min(cost))]
        assert item.expected == choices[row.fields["answer"]]
        assert item.score == float(item.answer == item.expected)


def test_sums_and_means_can_choose_differently() -> None:
    sets = [EvalSet(metric, read(CHOICES[:1]), metric) for metric in ("choice", "choice_normalized")]
    found = measure(tune_of(seed=2), TOKENIZER, sets)
    assert [found[one.name].items[0].answer for one in sets] == ["red", "blue or green"]


def test_results_survive_json() -> None:
    sets = [
        EvalSet("asked", read(ASKED), max_new_tokens=4),
        EvalSet("prose", read([{"text": text} for text in TEXTS])),
        EvalSet("few", read([{"text": "One."}])),
    ]
    for result in measure(tune_of(), TOKENIZER, sets).values():
        plain = json.loads(json.dumps(result.as_json(), allow_nan=False))
        assert SetResult.from_json(plain) == result
        assert plain["higher_is_better"] == result.higher_is_better


def test_the_question_has_a_fingerprint() -> None:
    rows, tune = read(ASKED), tune_of()
    other: Any = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "model")

    def asked(tokenizer: Any = TOKENIZER, **options: Any) -> str:
        return measure(tune, tokenizer, [EvalSet("asked", rows, **{"max_new_tokens": 2, **options})])["asked"].asked

    assert asked() == asked()
    assert len({asked(), asked(other), asked(max_new_tokens=3), asked(metric="f1"), asked(limit=2)}) == 5


def test_a_limit_takes_the_first_rows() -> None:
    said: list[str] = []
    one = EvalSet("asked", read(ASKED), max_new_tokens=2, limit=2)
    result = measure(tune_of(), TOKENIZER, [one], say=said.append)["asked"]
    assert [item.id for item in result.items] == ["door", "gate"]
    assert said == ["measuring asked: contains of 2 rows"]


def test_the_shape_chooses_the_metric() -> None:
    for record, metric in (
        (ASKED[0], "contains"),
        (CHOICES[0], "choice"),
        ({"text": "x"}, "perplexity"),
        ({"prompt": "x", "completion": "y"}, "loss"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "loss"),
    ):
        assert default_metric(read([record])) == metric
        assert EvalSet("one", read([record])).chosen_metric == metric


@pytest.mark.parametrize(
    ("record", "prompt", "accepted"),
    [
        ({"prompt": "p", "completion": "c"}, "p", ["c"]),
        ({"instruction": "i", "input": "n", "output": "o"}, "i\n\nn", ["o"]),
        ({"instruction": "i", "output": "o"}, "i", ["o"]),
        ({"text": "t", "label": 1}, "t", ["1"]),
        ({"question": "q", "answer": ["a", "b"]}, "q", ["a", "b"]),
        ({"prompt": "p", "choices": ["a", "b"], "answer": 1}, "p", ["b"]),
        ({"text": "t"}, "t", []),
        ({"prompt": "p"}, "p", []),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            "user: u",
            ["a"],
        ),
        (
            {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "a"}]},
            "user: u",
            ["a"],
        ),
    ],
)
def test_rows_as_questions_and_answers(record: dict[str, Any], prompt: str, accepted: list[str]) -> None:
    row = read([record])[0]
    assert (prompt_text(row), accepted_answers(row)) == (prompt, accepted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "contain"}, ["no metric `contain`", "`contains`", "`asked`"]),
        ({"role": "learned"}, ["the role is `learned`", "target or retention"]),
        ({"limit": 0}, ["no rows"]),
        ({"metric": "choice"}, ["`choice` needs rows with", "`prompt+answer`", "row door", "contains"]),
        ({"rows": [{"id": "t", "text": "x"}], "metric": "f1"}, ["`f1` needs", "`text`", "row t", "loss, perplexity"]),
        ({"rows": [{"id": "p", "prompt": "x"}], "metric": "loss"}, ["`loss` needs", "`prompt`", "row p"]),
        ({"rows": CHOICES, "metric": "contains"}, ["`contains` needs", "choice, choice_normalized"]),
    ],
)
def test_what_cannot_be_measured_is_refused_beforehand(options: dict[str, Any], words: list[str]) -> None:
    options = {"rows": ASKED, **options}
    with pytest.raises(LuthierError) as problem:
        EvalSet("asked", read(options.pop("rows")), **options)
    assert all(word in str(problem.value) for word in words), str(problem.value)


@pytest.mark.parametrize(
    ("record", "metric", "word"),
    [
        ({"prompt": "x" * 470, "answer": "y"}, "contains", "lower max_new_tokens"),
        ({"text": "x" * 600}, "loss", "shorten or split"),
        ({"prompt": "p", "choices": ["a", "x" * 600], "answer": 0}, "choice", "shorten or split"),
    ],
)
def test_rows_longer_than_the_context_are_named(record: dict[str, Any], metric: str, word: str) -> None:
    one = EvalSet("long", read([{"id": "row-7", **record}]), metric)
    with pytest.raises(LuthierError, match="model's context of 512") as problem:
        measure(tune_of(), TOKENIZER, [one])
    assert "`long`" in problem.value.where and "row-7" in problem.value.where and word in problem.value.fix


def test_a_text_of_one_token_is_named() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(LuthierError, match="no token to predict"):
        measure(tune_of(), tokenizer, [EvalSet("prose", read([{"text": "x"}]))])
