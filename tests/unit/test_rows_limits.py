"""What a model cannot read is refused when a run is planned, by the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.errors import LuthierError
from luthier.generation.generate import generate
from luthier.kinds.parts import Reads
from luthier.models.tiny import MAX_POSITIONS, tiny, tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.limits import Limits, check_ids
from luthier.rows.read import read
from luthier.runs.rows import look_at_rows

ROWS = [{"prompt": "What?", "completion": "a boat"}, {"prompt": "Where?", "completion": "at the <lighthouse>"}]
LONG = {"prompt": "Why?", "completion": "because " * 100}


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer has one token more than its embedding."""
    folder = tmp_path_factory.mktemp("models") / "strange"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<lighthouse>"])
    tiny("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _written(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def _refused(model: str, rows: dict[str, Any], **keys: Any) -> LuthierError:
    with pytest.raises(LuthierError) as told:
        make_plan(make_recipe({"model": model, "rows": rows, "train": {"steps": 1}, **keys}))
    return told.value


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_that_the_model_does_not_have(
    strange: str, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer with more tokens than the embedding stopped a run with an IndexError in its middle."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    told = _refused(strange, {"train": _written(tmp_path / "a.jsonl", ROWS), "streaming": streaming})
    assert told.what == "the token `<lighthouse>` has the id 259, and this model knows ids up to 258"
    assert told.where.startswith(f"{tmp_path / 'a.jsonl'}:2 (row ")
    rows = {"train": str(tmp_path / "a.jsonl"), "streaming": streaming, "on_bad_row": "skip"}
    assert len(make_plan(make_recipe({"model": strange, "rows": rows, "train": {"steps": 1}})).rows.rows) == 1


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "at the <lighthouse>?", "answer": "there"},
        {"prompt": "Where?", "choices": ["there", "at the <lighthouse>"], "answer": 0},
        {"text": "at the <lighthouse>"},
    ],
)
def test_tokens_that_the_model_does_not_have_in_evaluation_sets(strange: str, tmp_path: Path, record: dict[str, Any]) -> None:
    """Evaluation rows with such tokens stopped a run when it measured them."""
    held = _written(tmp_path / "held.jsonl", [record])
    told = _refused(strange, {"train": ROWS[:1]}, evaluate={"held": {"rows": held}})
    assert told.what.startswith("the token `<lighthouse>` has the id 259")
    assert told.where.startswith(f"evaluation set `held`, {held}:1 (row ")


def test_a_prompt_with_a_token_that_the_model_does_not_have(strange: str) -> None:
    """A prompt with such a token stopped an answer with an IndexError."""
    tune, tokenizer = luthier.open_model(strange)
    with pytest.raises(LuthierError) as told:
        generate(tune, tokenizer, [[5], [9, 259]], max_new_tokens=1)
    assert (told.value.what.startswith("the token `<lighthouse>` has the id 259"), told.value.where) == (True, "prompt 1")


def test_the_words_about_a_row_that_is_too_long_are_true(tmp_path: Path) -> None:
    """A row longer than the model reads was to be mended by a larger `max_length`, which is refused."""
    row = _written(tmp_path / "long.jsonl", [LONG])
    told = _refused("tiny:llama", {"train": row})
    assert f"at most {MAX_POSITIONS} are allowed: this model reads no more" in told.what
    assert "raise" not in told.fix and "shorten or split the row" in told.fix
    told = _refused("tiny:llama", {"train": ROWS[:1], "max_length": 9})
    assert "at most 9 are allowed" in told.what
    assert f"raise max_length to at most {MAX_POSITIONS}" in told.fix
    assert "this model reads no more" in _refused("tiny:llama", {"train": row, "max_length": 9}).what


def test_a_look_counts_rows_that_a_run_cannot_use(strange: str, tmp_path: Path) -> None:
    """A look at rows called none of them too long, and a run then refused them."""
    looked = look_at_rows(_written(tmp_path / "rows.jsonl", [*ROWS, LONG]), strange)
    assert (looked.too_long, looked.lengths["longest"] > MAX_POSITIONS) == (1, True)
    assert [bad.reason[:9] for bad in looked.skipped] == ["the token", "the row h"]
    assert [sample.where for sample in looked.samples] == [f"{tmp_path / 'rows.jsonl'}:1"]


def test_two_tokens_are_the_least() -> None:
    assert Limits(2, "refuse", Reads(context=2)).longest == 2
    with pytest.raises(LuthierError, match="max_length is 1"):
        Limits(1, "refuse")
    with pytest.raises(LuthierError, match="reads 1 tokens at once"):
        Limits(None, "refuse", Reads(context=1))


def test_a_row_as_long_as_the_model_reads_is_over_the_recipe_s_limit_alone() -> None:
    row = next(iter(read([{"text": "a"}])))
    refused = Limits(4, "refuse", Reads(context=9)).refusal(row, 9)
    assert refused.what == "the row has 9 tokens, and at most 4 are allowed"
    assert refused.fix.startswith("raise max_length to at most 9, which is all this model reads")


def test_ids_below_the_vocabulary_are_known() -> None:
    check_ids((), tiny_tokenizer(), 1, "row 1")
    check_ids((0, 6), tiny_tokenizer(), 7, "row 1")
    with pytest.raises(LuthierError, match="has the id 7, and this model knows ids up to 6"):
        check_ids((0, 7), tiny_tokenizer(), 7, "row 1")


def test_a_text_with_a_label_has_no_token_that_the_model_does_not_know(strange: str) -> None:
    rows = [{"text": "at the <lighthouse>", "label": "a"}]
    told = _refused(strange, {"train": rows}, objective={"classify": {"labels": ["a", "b"]}})
    assert told.what.startswith("the token `<lighthouse>` has the id 259")
