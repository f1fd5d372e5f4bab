"""Several labels a text, with a sigmoid each, and a prompt before them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import luthier
from luthier import registry
from luthier.errors import LuthierError
from luthier.evaluate.by_head import class_numbers, classified
from luthier.evaluate.readings import readings
from luthier.kinds import Batch, Head, LossTerm, Prompt, View
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from tests.conftest import make_batch
from tests.toys.helpers import gradients

LABELS = ("warm", "sun", "rain")
ROWS = [
    {"text": "a warm and sunny day", "label": ["warm", "sun"]},
    {"text": "cold rain", "label": ["rain"]},
    {"text": "sun and rain", "label": ["rain", "sun"]},
    {"text": "nothing", "label": []},
    {"text": "warm rain", "label": ["warm", 2]},
    {"text": "sun", "label": "sun"},
    {"text": "warmth", "label": 0},
]
MARKS = [[1, 1, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]]


def parts(**options: Any) -> tuple[Head, LossTerm]:
    head, term = registry.make({"multi_label": {"labels": LABELS, **options}}, ("head",)).values
    assert isinstance(head, Head) and isinstance(term, LossTerm)
    return head, term


def told_of(
    term: LossTerm, logits: list[list[float]], labels: tuple[str, ...], numbers: list[float] | None = None
) -> tuple[float, list[float]]:
    """The loss, summed over the rows, and the accuracy of each, of labels as they stand in encoded rows."""
    batch = make_batch([(3, 0)] * len(logits))
    columns = {} if numbers is None else {"label": torch.tensor(numbers, dtype=torch.float64)}
    view = View(
        batch._replace(texts={"label": labels}, columns=columns),
        {},
        label_N=torch.zeros(0),
        row_N=torch.zeros(0),
        position_N=torch.zeros(0),
    )
    view.head_output_BK = torch.tensor(logits, dtype=torch.float64)
    return float(term.total(view, {})), view.notes["accuracy"].tolist()


def loss_of(*given: Any) -> float:
    return told_of(*given)[0]


def test_the_loss_by_hand() -> None:
    """At logits of 0 a label that is there costs w ln 2 and another ln 2, a mean over the labels and not over their weights; the order in
    which a row names its labels plays no part."""
    _, term = parts(labels=("a", "b"), positive_weights=(3.0, 1.0))
    assert loss_of(term, [[0.0, 0.0]], ('["a"]',)) == pytest.approx(2 * math.log(2.0), rel=1e-12)
    assert loss_of(term, [[0.0, 0.0]], ("[]",)) == pytest.approx(math.log(2.0), rel=1e-12)
    _, plain = parts()
    logits = [[0.7, -1.2, 2.0], [0.3, 0.1, -0.4]]
    wanted = 0.0
    for row, right in zip(logits, ((1, 0, 1), (0, 1, 0)), strict=True):
        wanted += sum(math.log(1 + math.exp(-one if is_right else one)) for one, is_right in zip(row, right, strict=True)) / 3
    assert loss_of(plain, logits, ('["warm","rain"]', "sun")) == pytest.approx(wanted, rel=1e-12)
    assert loss_of(plain, logits, ('["rain",0]', ""), [math.nan, 1.0]) == pytest.approx(wanted, rel=1e-12)
    assert plain.count is not None and plain.count(make_batch([(3, 0), (4, 0)])) == 2.0


def test_what_is_told_of_labels_by_hand() -> None:
    """A label is named above a logit of 0."""
    logits = [[0.3, -0.3, 0.0], [0.3, 0.3, 0.3], [-0.3, 0.0, -0.3]]
    _, told = told_of(parts()[1], logits, ('["warm"]', '["rain"]', "[]"))
    assert told == pytest.approx([1.0, 1 / 3, 1.0])
    weighted = parts(positive_weights=(0.3, 0.2, 0.1))[1]
    assert loss_of(weighted, [[0.0] * 3], ('["warm","sun"]',)) == pytest.approx((0.3 + 0.2 + 1.0) * math.log(2.0) / 3, rel=1e-12)


def test_labels_are_told_by_hand() -> None:
    """Named above one half; all of a row's labels must be right, whatever their order."""
    head, _ = parts()
    rows = list(read(ROWS[:3]))
    logits = [torch.tensor([one]) for one in ([2.0, 0.1, -1.0], [0.0, 0.0, 0.0], [-1.0, 1.0, -0.1])]
    items = classified(head, rows, logits)
    assert [item.expected for item in items] == ["warm, sun", "rain", "sun, rain"]
    assert [item.answer for item in items] == ["warm, sun", "none", "sun"] and [item.score for item in items] == [1.0, 0.0, 0.0]
    assert items[2].counts == {"sun": (1, 1, 1), "rain": (1, 0, 0)}
    assert items[0].numbers == pytest.approx((1, 1, 0, 1, 1, 0, *(1 / (1 + math.exp(-one)) for one in (2.0, 0.1, -1.0))), rel=1e-6)
    single = head._replace(means="classes")
    with pytest.raises(LuthierError, match=r"list of labels, \['a'\], and this head tells one class"):
        class_numbers(single, ["a"], "row")


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_run_learns_them_and_comes_out_as_transformers_has_it(model: str, tmp_path: Path) -> None:
    found = luthier.train(
        model=f"tiny:{model}",
        rows={"train": ROWS},
        tune="lora",
        objective={"multi_label": {"labels": LABELS, "positive_weights": [2.0, 1.0, 1.5]}},
        train={"steps": 25, "batch_rows": 7, "learning_rate": 2e-2, "precision": "fp32"},
        evaluate={"same": {"rows": ROWS}, "order": {"rows": ROWS, "metric": "average_precision"}},
        out=str(tmp_path),
    )
    entry = found.metrics["same"]
    assert entry["metric"] == "macro_f1" and entry["before"] == 0.0 and entry["after"] > 0.9 and "confusion" not in entry
    assert found.metrics["order"]["after"] > 0.9
    tune, tokenizer = luthier.open_run(found.folder)
    rows = encode_all(list(read(ROWS)), tokenizer, purpose="read").rows
    said_BK = readings(tune, rows)
    found.export(tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.problem_type == "multi_label_classification" and theirs.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        logits_BK = torch.cat([theirs(torch.tensor([row.token_ids])).logits for row in rows])
        loss = theirs(torch.tensor([rows[0].token_ids]), labels=torch.tensor([MARKS[0]]).float()).loss
    torch.testing.assert_close(logits_BK, said_BK, atol=1e-5, rtol=1e-5)
    _, term = parts()
    assert loss_of(term, said_BK[:1].double().tolist(), ('["sun","warm"]',)) == pytest.approx(float(loss), rel=1e-5)


def test_a_prompt_and_a_head_learn_alone(engine: Any, now: Any) -> None:
    """PTEC: gradients reach both and nothing else; the head reads the last own token of a row behind the prompt, with its own rate."""
    part = registry.make({"ptec": {"labels": ("no", "yes"), "length": 3, "prompt_learning_rate": 0.05}}, ("prompt",))
    assert [type(value) for value in part.values] == [Prompt, Head, LossTerm]
    run = engine(part, objective=None)
    batch = make_batch([(6, 0), (4, 0)])._replace(texts={"label": ('["yes"]', "[]")})
    assert sorted(run.tune.trained) == ["ptec.prompt_PD", "ptec/head.weight"]
    assert run.step([batch], now).loss == pytest.approx(math.log(2.0), rel=1e-12)
    run.tune.set({"ptec/head.weight": torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))})
    found = gradients(run, [batch], now)
    assert found.keys() == set(run.tune.trained) and all(bool(one.abs().max() > 0) for one in found.values())
    assert run.tune.trained["ptec.prompt_PD"].rate == pytest.approx(0.05 / now.run_rate)
    assert all(one.grad is None for one in run.tune.model.parameters())
    assert not found.keys() & {"lm_head.weight"} and run.objective.columns() == ()


def test_what_a_prompt_and_a_head_learnt_is_opened_again(tmp_path: Path) -> None:
    """Their tensors do not mix, and the numbers are those of the run."""
    found = luthier.train(
        model="tiny:llama",
        rows={"train": ROWS},
        tune={"ptec": {"labels": LABELS, "length": 4}},
        train={"steps": 30, "batch_rows": 7, "learning_rate": 2e-2, "precision": "fp32"},
        evaluate={"same": {"rows": ROWS}},
        out=str(tmp_path),
    )
    assert found.metrics["same"]["after"] > 0.9
    tune, tokenizer = luthier.open_run(found.folder)
    assert tune.head is not None and tune.head[0].masters().keys() == {"weight"} and tune.prompt_length == 4
    said_BK = readings(tune, encode_all(list(read(ROWS)), tokenizer, purpose="read").rows)
    assert ((said_BK > 0).long() == torch.tensor(MARKS)).double().mean() > 0.9
    assert found.facts["trained_parameters"] == 4 * 32 + 3 * 32


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("multi_label", {"labels": ()}, "name one label or more"),
        ("multi_label", {"labels": ("a", "a")}, "each once"),
        ("multi_label", {"labels": ("a", "b"), "positive_weights": (1.0,)}, "give one above 0 for each label"),
        ("multi_label", {"labels": ("a", "b"), "positive_weights": (1.0, 0.0)}, "give one above 0 for each label"),
        ("ptec", {"labels": ("a",), "length": 0}, "0 tokens"),
        ("ptec", {"labels": ("a",), "prompt_learning_rate": 0.0}, "use more than 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        registry.make({name: options}, ("head", "prompt"))


@pytest.mark.parametrize(
    ("objective", "label", "words"),
    [
        ({"multi_label": {"labels": LABELS}}, ["sun", "snow"], "has the label `snow`, and the labels are warm, sun, rain"),
        ({"multi_label": {"labels": LABELS}}, [3], "has the label `3`"),
        ({"classify": {"labels": LABELS}}, ["sun"], "use objective: multi_label, for lists"),
        ({"multi_label": {"labels": LABELS}}, ["sun", "sun"], "names a label twice"),
    ],
    ids=str,
)
def test_labels_that_are_not_known_are_refused(objective: Any, label: Any, words: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": ["sun"] if "multi_label" in objective else "sun"}, {"text": "b", "label": label}]
    with pytest.raises(LuthierError, match=words):
        luthier.train(
            model="tiny:llama", rows={"train": rows}, tune="lora", objective=objective, train={"steps": 1}, out=str(tmp_path)
        )


def test_a_row_without_a_label_is_refused() -> None:
    _, term = parts()
    assert term.check is not None
    bare: Batch = make_batch([(3, 0)])
    with pytest.raises(LuthierError, match="has the label `None`"):
        term.check(bare)
