"""Likelihoods of rows under other models, as a score and as a column; and the way from there to preference-oriented fine-tuning."""

from __future__ import annotations

import json
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier import registry
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.kinds import RowLikelihood, RowScore
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.rows.batches import collate
from luthier.rows.encode import encode
from luthier.rows.read import read
from luthier.rows.select import score_rows, select_rows
from luthier.runs.measure import likelihood_of_rows
from tests.toys.helpers import plain_loss

COLUMN = "aligned_log_likelihood"
TOKENIZER: Any = tiny_tokenizer()
TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two."},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "f\u00f6ur, five."},
]
POOL = [
    {"prompt": "What is the color of the door?", "completion": "Red.", "topics": ["door"]},
    {"id": "talk", "messages": TURNS, "level": 3},
    {"text": "A document that is quite a bit longer than the answers."},
    {"instruction": "Name a color.", "input": "", "output": "Green or blue."},
]
exact = partial(likelihood_of_rows, precision="fp64")


def file_of(folder: Path, rows: list[dict[str, Any]] = POOL) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(*words: object, code: int = 0) -> Any:
    """The command's one JSON document."""
    result = CliRunner().invoke(app, ["rows", *map(str, words), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_mean_is_the_loss_that_training_has(architecture: str, loss_on: Any) -> None:
    """Of each row alone, by plain transformers, over the targets that training has."""
    rows = read(POOL).rows
    found = exact(f"tiny:{architecture}", rows, loss_on=loss_on)
    model = tiny(architecture).double()
    for row, one in zip(rows, found, strict=True):
        batch = collate([encode(row, TOKENIZER, loss_on=loss_on)])
        assert one.tokens == batch.supervised > 0
        with torch.no_grad():
            assert one.log_likelihood / one.tokens == pytest.approx(-float(plain_loss(model, batch)), rel=1e-12)


def test_characters_are_those_of_the_answers() -> None:
    """The tiny tokenizer has a token for each byte: `\u00f6` is two, and each turn's end is one that is no character."""
    talk = read(POOL)[1:2]
    both, last = (exact("tiny:llama", talk, loss_on=turns)[0] for turns in ("assistant", "last"))
    assert last[1:] == (len(b"f__ur, five.") + 1, len("f\u00f6ur, five."))
    assert both.characters == len("two.") + last.characters and both.tokens == len("two.") + 1 + last.tokens


def test_means_by_hand() -> None:
    by_model = {
        "a": [RowLikelihood(-6.0, 3, 12), RowLikelihood(-1.0, 4, 8)],
        "b": [RowLikelihood(-6.0, 6, 12), RowLikelihood(-3.0, 2, 8)],
    }
    pool, asked = [{"text": "x"}, {"text": "y"}], []

    def likely(model: str, rows: Any) -> list[RowLikelihood]:
        asked.append((model, len(rows)))
        return by_model[model]

    for per, wanted in (("token", (-1.5, -0.875)), ("character", (-0.5, -0.25))):
        found = score_rows(pool, {"likelihood": {"models": ["a", "b"], "per": per}}, likely=likely)
        assert found.scores == wanted
    assert asked == [("a", 2), ("b", 2)] * 2, "each model once, with all rows"
    assert score_rows(pool, {"likelihood": {"models": ["b"]}}, likely=likely).scores == (-1.0, -1.5)


def test_a_run_scores_too(tmp_path: Path) -> None:
    """A run's rows become likelier by its training."""
    run = luthier.train(
        model="tiny:llama", rows={"train": POOL}, out=str(tmp_path), train={"steps": 5, "learning_rate": 1e-2, "precision": "fp32"}
    )
    before, after = (
        score_rows(POOL, {"likelihood": {"models": [name]}}, likely=exact).scores for name in ("tiny:llama", str(run.folder))
    )
    assert all(new > old + 0.1 for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "no one answer to learn"),
        ([{"prompt": "a", "completion": "b" * 600}], "at most 512 are allowed"),
        ([{"messages": TURNS[:1]}, {"messages": TURNS[2:3]}], "2 of 6 rows cannot be used"),
    ],
)
def test_rows_that_no_model_can_score_are_named(broken: list[Any], error: str) -> None:
    with pytest.raises(LuthierError, match=error) as caught:
        exact("tiny:llama", read([*POOL, *broken]).rows)
    assert caught.value.where.startswith("row 5 (row ") and "remove these rows" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "error"),
    [({"models": []}, "no model is named"), ({"models": ["a", "a"]}, "one model is named twice"), ({"per": "word"}, "per")],
)
def test_options_are_checked(options: dict[str, Any], error: str) -> None:
    with pytest.raises(LuthierError, match=error):
        registry.part("likelihood", **options)


def test_a_score_that_runs_models_says_what_it_needs() -> None:
    with pytest.raises(LuthierError, match="`likelihood` runs models") as caught:
        score_rows(POOL, "likelihood")
    assert "luthier.runs.measure.likelihood_of_rows" in caught.value.fix
    with pytest.raises(LuthierError, match="loss on `first`"):
        score_rows(POOL, "likelihood", likely=partial(exact, loss_on="first"))


def test_the_command_writes_the_rows_with_their_score(tmp_path: Path) -> None:
    source, out = file_of(tmp_path), tmp_path / "scored.jsonl"
    words = ["score", source, "--by", "likelihood", "models=[tiny:llama, tiny:gpt2]"]
    facts = call(*words, "--column", COLUMN, "--out", out)
    assert [list(line) for line in lines(out)] == [[*row, COLUMN] for row in POOL], "last, and the others in their order"
    assert [{k: v for k, v in line.items() if k != COLUMN} for line in lines(out)] == POOL
    call(*words, "--out", tmp_path / "plain.jsonl")
    assert [line[COLUMN] for line in lines(out)] == [line["score"] for line in lines(tmp_path / "plain.jsonl")]
    assert facts["column"] == COLUMN and facts["highest"] == max(line[COLUMN] for line in lines(out))
    assert [row.columns[COLUMN] for row in read(out)] == [line[COLUMN] for line in lines(out)]
    chosen = call(
        "select",
        source,
        "models=[tiny:llama]",
        "--by",
        "likelihood",
        "--loss-on",
        "last",
        "--count",
        1,
        "--out",
        tmp_path / "one.jsonl",
    )
    assert chosen["picked"] == 1


def test_records_of_other_files_keep_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,year\nshort,7\n"a text,\nof two lines",8\n')
    length = RowScore(lambda rows, services: [float(len(row.fields["text"])) for row in rows])
    found = score_rows(path, length, column="length", out=tmp_path / "out.jsonl")
    wanted = [{"text": "short", "year": 7, "length": 5.0}, {"text": "a text,\nof two lines", "year": 8, "length": 20.0}]
    assert list(found.lines()) == lines(tmp_path / "out.jsonl") == wanted
    assert list(score_rows(iter([{"text": "ab"}]), length, column="n").lines()) == [{"text": "ab", "n": 2.0}], "read once"


@pytest.mark.parametrize(
    ("column", "error"),
    [
        ("topics", "1 of 4 rows have a key `topics`"),
        ("completion", "no name for a free column"),
        ("label", "no name"),
        ("id", "no name"),
    ],
)
def test_a_column_must_be_new(column: str, error: str, tmp_path: Path) -> None:
    words = ["score", file_of(tmp_path), "--by", "random_rows", "--column", column, "--out", tmp_path / "scored.jsonl"]
    found = call(*words, code=2)
    assert error in found["error"] and not (tmp_path / "scored.jsonl").exists()
    if column == "topics":
        assert found["where"].endswith("train.jsonl:1")


def test_rows_without_their_records_take_no_column() -> None:
    with pytest.raises(LuthierError, match="no records"):
        score_rows(read(POOL), "random_rows", column="score")
    assert list(select_rows(POOL, "random_rows", count=4).records) != [] and all("score" not in row for row in POOL)


def run_of(rows: Any, folder: Path, **keys: Any) -> Any:
    train = {"steps": 2, "batch_rows": 4, "micro_batch_tokens": 200, "precision": "fp32", "learning_rate": 1e-3}
    return luthier.train(model="tiny:llama", rows={"train": rows}, objective="poft", out=str(folder), train=train, **keys)


def test_a_model_that_is_compared_with_itself_begins_at_log_2(tmp_path: Path) -> None:
    """Score and training see the same targets in the same template: u is 0 for every row."""
    out = tmp_path / "scored.jsonl"
    score_rows(file_of(tmp_path), {"likelihood": {"models": ["tiny:llama"]}}, likely=exact, column=COLUMN, out=out)
    first, second = run_of(str(out), tmp_path / "runs").facts["history"]
    assert first["loss"] == pytest.approx(log(2), abs=1e-5) and first["notes"]["poft weight"] == pytest.approx(0.5, abs=1e-5)
    assert second["loss"] < first["loss"] and second["notes"]["poft weight"] < 0.5


def test_a_missing_score_is_told_before_anything_is_written(tmp_path: Path) -> None:
    rows = [{**row, **({} if i == 1 else {COLUMN: -1.0})} for i, row in enumerate(POOL)]
    with pytest.raises(LuthierError, match=f"1 of [1-4] rows of a micro-batch have no finite number `{COLUMN}`") as caught:
        run_of(rows, tmp_path / "runs")
    assert caught.value.where == "rows talk" and f"--column {COLUMN}" in caught.value.fix
    assert not (tmp_path / "runs").exists()
