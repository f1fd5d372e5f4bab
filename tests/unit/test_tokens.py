"""Labels of words: how rows say them, which tokens bear them, what is learnt, measured and exported of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import luthier
from luthier import registry
from luthier.errors import LuthierError
from luthier.evaluate.by_head import tagged
from luthier.evaluate.readings import readings, readings_by_row
from luthier.kinds import Head, LossTerm, View
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.batches import collate
from luthier.rows.encode import encode, encode_all
from luthier.rows.read import read
from luthier.rows.spans import entities_of, first_pieces
from luthier.training.readout import words_of
from tests.conftest import make_batch, split
from tests.toys.helpers import gap, gradients

ROWS = [
    {"tokens": ["Mara", "lives", "in", "North", "Hill", "."], "tags": ["B-person", "O", "O", "B-place", "I-place", "O"]},
    {
        "text": "Yesterday Mara Quill saw Rome.",
        "spans": [{"start": 10, "stop": 20, "label": "person"}, {"start": 25, "end": 29, "label": "place"}],
    },
    {"text": "Nothing here.", "spans": []},
    {"tokens": ["In", "Rome"], "tags": ["O", "B-place"]},
    {"tokens": ["Quill", "left"], "tags": ["B-person", "O"]},
    {"tokens": ["the", "Hill"], "tags": ["O", "B-place"]},
]
TAGS = ("O", "B-person", "I-person", "B-place", "I-place")
OBJECTIVE = {"classify_tokens": {"labels": ["person", "place"]}}


def parts(**options: Any) -> tuple[Head, LossTerm]:
    head, term = registry.make({"classify_tokens": {"labels": ("person", "place"), **options}}, ("head",)).values
    assert isinstance(head, Head) and isinstance(term, LossTerm)
    return head, term


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        (["O", "B-a", "I-a", "O"], [("a", 1, 3)]),
        (["B-a", "B-a", "I-a"], [("a", 0, 1), ("a", 1, 3)]),
        (["I-a", "I-a", "O", "I-b"], [("a", 0, 2), ("b", 3, 4)]),
        (["B-a", "I-b", "I-b"], [("a", 0, 1), ("b", 1, 3)]),
        (["B-a-b", "I-a-b"], [("a-b", 0, 2)]),
        (["O", "O"], []),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(tags: list[str], wanted: list[tuple[str, int, int]]) -> None:
    assert entities_of(tags) == wanted


def test_a_word_bears_its_label_at_its_first_token() -> None:
    """Special tokens are of no characters; a token may begin with the space before its word, or hold several words."""
    words = [(0, 3), (4, 9), (9, 10)]
    assert first_pieces(words, [(0, 0), (0, 3), (4, 7), (7, 9), (9, 10), (0, 0)]) == (0, 1, 2, 0, 3, 0)
    assert first_pieces(words, [(0, 2), (2, 3), (3, 9), (9, 10)]) == (1, 0, 2, 3), "a space before the word"
    assert first_pieces(words, [(0, 3), (4, 10)]) == (1, 2), "the third word begins within the second's token"
    assert first_pieces(words, [(0, 3), (9, 10)]) == (1, 3), "no token is of the second word"


def test_tokens_of_rows_are_those_of_transformers() -> None:
    """Of a tokenizer with one token a byte the labelled ones are the words' first letters; the ids are those of the words in a text."""
    tokenizer: Any = tiny_tokenizer()
    for row in read(ROWS):
        encoded = encode(row, tokenizer, purpose="read")
        assert list(encoded.token_ids) == tokenizer(row.fields["text"])["input_ids"]
        begins = {int(word): place for place, word in enumerate(encoded.token_columns["word"]) if word}
        assert sorted(begins) == list(range(1, len(row.fields["words"]) + 1))
        assert [begins[word] for word in sorted(begins)] == [first for first, _ in row.fields["words"]]
        assert encoded.columns["tags"] == "\n".join(row.fields["tags"])
    (row,) = read([{"text": "ab cd", "spans": [{"start": 1, "stop": 4, "label": "x"}]}])
    assert row.fields["words"] == [(0, 1), (1, 2), (3, 4), (4, 5)] and row.fields["tags"] == ["O", "B-x", "I-x", "O"]
    long = encode(next(iter(read(ROWS))), tokenizer, purpose="read", max_length=6, too_long="right")
    assert [word for word in long.token_columns["word"] if word] == [1.0, 6.0], "the text's own end stays"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "`tokens` must be a list of texts"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, r"`tokens\[1\]` must be text"),
        ({"text": "a b", "spans": [{"start": 0, "stop": 9, "label": "x"}]}, "from 0 to 9, and the text has 3 characters"),
        ({"text": "a b", "spans": [{"start": 2, "stop": 1, "label": "x"}]}, "from 2 to 1"),
        ({"text": "a b", "spans": [{"start": 0, "stop": 1}]}, r"`spans\[0\]: label` must be text"),
        ({"text": "a b", "spans": [{"start": 1, "stop": 2, "label": "x"}]}, "holds no word"),
        (
            {"text": "abcd", "spans": [{"start": 0, "stop": 3, "label": "x"}, {"start": 2, "stop": 4, "label": "y"}]},
            "overlap at character 2",
        ),
    ],
    ids=str,
)
def test_labels_that_fit_no_word_are_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        list(read([row]))


def test_the_loss_is_that_of_labelled_words_by_hand() -> None:
    """A mean over all words of the step, in which a row of three counts three times; the numbers of words say which tag is whose."""
    head, term = parts()
    assert head.names == TAGS and head.pool == "words"
    batch = make_batch([(4, 0), (3, 0)])
    word_BT = torch.tensor([[0.0, 1, 3, 0], [1, 0, 2, 0]])
    batch = batch._replace(token_columns={"word": word_BT}, texts={"tags": ("O\nO\nB-place", "I-person\nO")})
    row_N, time_N = words_of(batch)
    assert row_N.tolist() == [0, 0, 1, 1] and time_N.tolist() == [1, 2, 0, 2]
    assert term.count is not None and term.count(batch) == 4.0
    logits_NK = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view = View(batch, {}, label_N=torch.zeros(0), row_N=torch.zeros(0), position_N=torch.zeros(0))
    view.head_output_BK = logits_NK
    wanted = 0.0
    for logits, tag in zip(logits_NK.tolist(), ("O", "B-place", "I-person", "O"), strict=True):
        wanted += math.log(sum(map(math.exp, logits))) - logits[TAGS.index(tag)]
    assert term.total(view, {}).item() == pytest.approx(wanted, rel=1e-12)
    view.head_output_BK = torch.eye(5, dtype=torch.float64)[[0, 3, 1, 0]]
    term.total(view, {})
    assert view.notes["accuracy"].tolist() == [1.0, 1.0, 0.0, 1.0]


def test_one_label_makes_three_tags() -> None:
    assert parts(labels=("sum",))[0].names == ("O", "B-sum", "I-sum")
    assert parts(labels=("O", "B-sum"), scheme="plain")[0].names == ("O", "B-sum")


def test_any_split_of_words_gives_the_same(engine: Any, now: Any) -> None:
    """Rows of one and of many words, packed and padded, in one micro-batch and in several."""
    tokenizer: Any = tiny_tokenizer()
    batch = collate(encode_all(list(read(ROWS)), tokenizer, purpose="read").rows)
    run = engine({"lora": {"rank": 2}}, objective=OBJECTIVE)
    rng = torch.Generator().manual_seed(0)
    for name, one in run.tune.trained.items():
        run.tune.set({name: one.master.detach() + 0.1 * torch.randn(one.master.shape, generator=rng)})
    found = [gradients(run, split(batch, sizes), now) for sizes in ((6,), (1, 3, 2), (2, 0, 4))]
    assert gap(found[1], found[0]) < 1e-10 and gap(found[2], found[0]) < 1e-10
    assert any(bool(one.abs().max() > 0) for name, one in found[0].items() if "lora" in name)


@pytest.mark.parametrize(("model", "tune"), [("bert", "lora"), ("llama", "full"), ("gpt2", "lora"), ("distilbert", "half")])
def test_words_are_tagged_as_transformers_does(model: str, tune: str, tmp_path: Path) -> None:
    """Trained until all entities are found, opened, and exported: plain `transformers` gives the same logits at the same tokens."""
    found = luthier.train(
        model=f"tiny:{model}",
        rows={"train": ROWS},
        tune=tune,
        objective=OBJECTIVE,
        train={"steps": 25, "batch_rows": 6, "learning_rate": 1e-2, "precision": "fp32"},
        evaluate={"same": {"rows": ROWS}, "words": {"rows": ROWS, "metric": "tag_accuracy"}},
        out=str(tmp_path),
    )
    entry = found.metrics["same"]
    assert entry["metric"] == "entity_f1" and entry["before"] == 0.0 and entry["after"] > 0.9
    assert {name: one["n"] for name, one in entry["by_class"].items()} == {"place": 4, "person": 3}
    assert found.metrics["words"]["before"] == pytest.approx(12 / 21), "all words are told O"
    opened, tokenizer = luthier.open_run(found.folder)
    rows = encode_all(list(read(ROWS)), tokenizer, purpose="read").rows
    said = readings_by_row(opened, rows)
    assert [len(one) for one in said] == [6, 6, 3, 2, 2, 2] and torch.equal(torch.cat(said), readings(opened, rows))
    found.export(tmp_path / "out")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == dict(enumerate(TAGS))
    for row, mine_NK in zip(rows, said, strict=True):
        with torch.no_grad():
            logits_TK = theirs(torch.tensor([row.token_ids])).logits[0]
        begins = [place for place, word in enumerate(row.token_columns["word"]) if word]
        torch.testing.assert_close(logits_TK[begins], mine_NK, atol=1e-5, rtol=1e-5)


def test_entities_of_a_row_by_hand() -> None:
    """A word without a token of its own is told O; a name that is right at one end alone is wrong."""
    head, _ = parts()
    row = next(iter(read(ROWS)))
    tokenizer: Any = tiny_tokenizer()
    encoded = encode(row, tokenizer, purpose="read")
    lost = tuple(0.0 if word == 5 else word for word in encoded.token_columns["word"])
    encoded = replace(encoded, token_columns={"word": lost})
    said = ["B-person", "O", "B-place", "B-place", "O"]
    logits_NK = torch.eye(5)[[TAGS.index(tag) for tag in said]]
    (item,) = tagged(head, [row], [encoded], [logits_NK], entities=True)
    assert item.expected == "person: Mara; place: North Hill" and item.answer == "person: Mara; place: in; place: North"
    assert item.numbers == (1.0, 2.0, 3.0) and item.score == pytest.approx(2 / 5)
    assert item.counts == {"person": (1, 1, 1), "place": (1, 2, 0)}
    (item,) = tagged(head, [row], [encoded], [logits_NK], entities=False)
    assert item.score == pytest.approx(4 / 6) and item.weight == 6.0


def test_tags_without_entities(tmp_path: Path) -> None:
    rows = [{"tokens": ["Mara", "left"], "tags": ["noun", "verb"]}, {"tokens": ["stay", "Quill"], "tags": ["verb", "noun"]}]
    found = luthier.train(
        model="tiny:bert",
        rows={"train": rows},
        tune="lora",
        objective={"classify_tokens": {"labels": ["noun", "verb"], "scheme": "plain"}},
        train={"steps": 8, "batch_rows": 2, "learning_rate": 1e-2, "precision": "fp32"},
        evaluate={"same": {"rows": rows}},
        out=str(tmp_path),
    )
    assert found.metrics["same"]["metric"] == "tag_accuracy"
    assert (found.metrics["same"]["before"], found.metrics["same"]["after"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": ()}, "name 1 or more"),
        ({"labels": ("a", "a")}, "each once"),
        ({"labels": ("a",), "scheme": "plain"}, "name 2 or more"),
        ({"labels": ("B-person",)}, "`B-person` is a tag"),
        ({"labels": ("a", "I-", "O")}, "`I-` is a tag"),
        ({"labels": ("a", "O")}, "`O` is a tag"),
    ],
    ids=str,
)
def test_labels_that_are_none_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LuthierError, match=words):
        parts(**options)


@pytest.mark.parametrize(
    ("rows", "objective", "words"),
    [
        ([{"tokens": ["a"], "tags": ["B-thing"]}], OBJECTIVE, "tag is `B-thing`, and the tags are O, B-person"),
        ([{"text": "a", "label": "x"}], OBJECTIVE, "words have no labels"),
        (ROWS, "cross_entropy", "use an objective that reads labels of words"),
    ],
    ids=["unknown", "none", "language"],
)
def test_rows_without_known_labels_are_refused(rows: Any, objective: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=words):
        luthier.train(
            model="tiny:llama", rows={"train": rows}, objective=objective, train={"steps": 1, "batch_rows": 1}, out=str(tmp_path)
        )


def test_words_behind_the_last_token_and_spans_that_touch() -> None:
    assert first_pieces([(0, 3), (4, 9)], [(0, 3)]) == (1,) and first_pieces([(0, 1)], []) == ()
    spans = [{"start": 0, "stop": 2, "label": "x"}, {"start": 2, "stop": 4, "label": "y"}]
    (row,) = read([{"text": "abcd", "spans": spans}])
    assert (row.fields["words"], row.fields["tags"]) == ([(0, 2), (2, 4)], ["B-x", "B-y"])
