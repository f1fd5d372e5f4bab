"""Columns under other names: what is read is what would be read had they been renamed in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.evaluate.planned import evaluation_sets
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.numbers import _options
from luthier.planning.plan import Plan, make_plan
from luthier.planning.read import columns_told
from luthier.recipe import EvaluationSet, RowsRecipe, TrainRecipe, differences, make_recipe
from luthier.rows.cache import inputs_of
from luthier.rows.chat import form_of
from luthier.rows.chunks import Encoding
from luthier.rows.columns import _HELD, mapped, parse_columns, path_of, renamed
from luthier.rows.look import look
from luthier.rows.numbers import command_of
from luthier.rows.read import Rows, read, read_as, stream
from luthier.rows.select import score_rows, select_rows
from luthier.rows.shapes import BadRow
from luthier.rows.sources import Streamed, read_rows

THEIRS = [
    {"ticket": 7, "customer_question": "Is it open?", "agent_reply": "007", "score": 1},
    {"ticket": 8, "customer_question": "Until when?", "agent_reply": "8", "score": 2},
]
OURS = [
    {"ticket": 7, "prompt": "Is it open?", "completion": "007", "score": 1},
    {"ticket": 8, "prompt": "Until when?", "completion": "8", "score": 2},
]
NAMED = {"prompt": "customer_question", "completion": "agent_reply"}


def _table(path: Path, records: list[dict[str, Any]], comma: str = ",") -> Path:
    lines = [comma.join(records[0]), *(comma.join(map(str, record.values())) for record in records)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def _whole(rows: Rows) -> list[Any]:
    return [(row.id, row.shape, dict(row.fields), dict(row.columns), row.derived) for row in rows]


def _refused(call: Callable[[], Any]) -> LuthierError:
    with pytest.raises(LuthierError) as told:
        call()
    return told.value


@pytest.mark.parametrize("write", [_table, _lines, _parquet])
def test_a_mapped_file_reads_as_the_renamed_one(tmp_path: Path, write: Callable[[Path, Any], Path]) -> None:
    """Also its ids, its free columns and what is text: a reply of `007` is no number, and the ticket is one."""
    ending = {_table: "csv", _lines: "jsonl", _parquet: "parquet"}[write]  # type: ignore[index]
    theirs, ours = write(tmp_path / f"theirs.{ending}", THEIRS), write(tmp_path / f"ours.{ending}", OURS)
    found = read(theirs, columns=NAMED)
    assert _whole(found) == _whole(read(ours))
    assert found[0].fields == {"prompt": "Is it open?", "completion": "007"}
    assert found[0].columns == {"ticket": 7, "score": 1}, "a column that was mapped away is no free column"
    streamed = [row for row in stream(theirs, columns=NAMED) if not isinstance(row, BadRow)]
    assert [row.id for row in streamed] == [row.id for row in found]
    assert _whole(read(datasets.Dataset.from_list(THEIRS), columns=NAMED)) == _whole(read(OURS))


def test_a_column_that_becomes_a_number_is_read_as_one(tmp_path: Path) -> None:
    path = _table(tmp_path / "a.csv", [{"body": "good", "output": 1}, {"body": "bad", "output": 0}])
    rows = read(path, columns={"text": "body", "label": "output"})
    assert [row.fields["label"] for row in rows] == [1, 0], "`output` is text where it is one, and this is a label"
    assert [row.id for row in read(path, columns={"text": "body", "id": "output"})] == ["1", "0"]


def test_one_column_may_be_several_keys_and_keys_may_change_places() -> None:
    assert renamed({"a": "x"}, {"prompt": "a", "topic": "a"}) == {"prompt": "x", "topic": "x"}
    turned = renamed({"prompt": "hello", "completion": "hallo"}, {"prompt": "completion", "completion": "prompt"})
    assert turned == {"prompt": "hallo", "completion": "hello"}
    assert renamed({"prompt": "x"}, {"prompt": "prompt"}) == {"prompt": "x"}


def test_dots_lead_into_records_within_records() -> None:
    record = {"data": {"question": "Why?", "about": {"n": 1}}, "answers": ["so", "thus"], "a.b": "with a dot"}
    assert path_of(record, "data.about.n") == ("data", "about", "n")
    assert path_of(record, "a.b") == ("a.b",), "a name that is there goes first"
    assert path_of(record, "answers.1") == ("answers", 1)
    for column in ("data.answer", "answers.2", "answers.-1", "a.c", "data.question.0"):
        assert path_of(record, column) is None, column
    found = renamed(record, {"prompt": "data.question", "completion": "answers.1", "text": "a.b"})
    assert found == {
        "prompt": "Why?",
        "completion": "thus",
        "text": "with a dot",
        "data": {"about": {"n": 1}},
        "answers": ["so", "thus"],
    }
    assert record["data"] == {"question": "Why?", "about": {"n": 1}}, "the record itself stays"
    assert renamed({"data": {"q": "a", "r": "b"}}, {"prompt": "data.q", "completion": "data.r"}) == {
        "prompt": "a",
        "completion": "b",
    }
    both = renamed({"data": {"q": "a"}}, {"all": "data", "prompt": "data.q"})
    assert both == {"all": {"q": "a"}, "prompt": "a"}


def test_a_column_that_no_row_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = _table(tmp_path / "a.csv", THEIRS)
    told = _refused(lambda: read(path, columns={**NAMED, "completion": "agent_replay"}, on_bad_row="skip"))
    assert told.what == ("no row has a column `agent_replay`; there are `ticket`, `customer_question`, `agent_reply`, `score`")
    assert told.where == f"{path} (rows.columns.completion)"
    assert told.fix == "did you mean `agent_reply`? Else name another, or leave `completion` out"
    nested = _refused(lambda: read([{"data": {"question": "a"}}], columns={"prompt": "data.qestion"}))
    assert "`data.question`" in nested.fix and nested.where == "list (rows.columns.prompt)"
    with pytest.raises(LuthierError, match="no row has a column `agent_replay`"):
        list(stream(path, columns={"completion": "agent_replay"}))
    assert "there are no rows" in _refused(lambda: read([], columns=NAMED)).what


def test_a_column_may_be_missing_in_some_rows() -> None:
    records = [*THEIRS, {"customer_question": "Who?", "agent_reply": "Me.", "manners": "Be kind."}]
    rows = read(records, columns={**NAMED, "system": "manners"})
    assert [len(row.fields["prompt"]) if isinstance(row.fields["prompt"], list) else 0 for row in rows] == [0, 0, 2]
    late = [("row", {"a": str(number)}) for number in range(_HELD + 5)]
    assert len(list(mapped([*late, ("last", {"b": "x"})], {"text": "a", "label": "b"}, "here"))) == _HELD + 6
    first = next(mapped(iter(late), {"text": "a", "label": "b"}, "here"))
    assert first == ("row", {"text": "0"}), "rows are not all held until the last column is found"
    with pytest.raises(LuthierError, match="no row has a column `b`"):
        list(mapped(late, {"text": "a", "label": "b"}, "here"))


def test_a_key_that_the_row_has_itself_is_refused() -> None:
    told = _refused(lambda: read([{"prompt": "mine", "customer_question": "theirs", "agent_reply": "so"}], columns=NAMED))
    assert told.what == "the row has a `prompt` of its own, and `prompt` shall be its `customer_question`"
    assert told.where == "row 1 (rows.columns.prompt)"
    kept = read([{"prompt": "mine", "q": "theirs", "completion": "so"}], columns={"prompt": "q", "own_prompt": "prompt"})
    assert kept[0].fields["prompt"] == "theirs" and kept[0].columns == {"own_prompt": "mine"}


def test_columns_as_a_command_line_writes_them() -> None:
    assert parse_columns("prompt=customer_question,completion=agent_reply") == NAMED
    assert parse_columns("prompt = Question, as asked ,completion=a=b") == {"prompt": "Question, as asked", "completion": "a=b"}
    assert parse_columns(None) is None
    for text, what in (("prompt", "`prompt` is not key=column"), ("prompt=", "not key"), ("a=b,a=c", "`a` stands twice")):
        assert what in _refused(lambda text=text: parse_columns(text)).what


def test_sources_have_columns_of_their_own() -> None:
    recipe = RowsRecipe(
        train=[{"rows": THEIRS}, {"rows": [{"q": "One?", "a": "Yes."}], "columns": {"prompt": "q", "completion": "a"}},
               {"rows": [{"text": "plain"}], "columns": {}}],
        columns=NAMED,
    )  # fmt: skip
    assert [[row.shape for row in rows] for rows in read_rows(recipe)] == [
        ["prompt+completion"] * 2,
        ["prompt+completion"],
        ["text"],
    ]
    assert [one.columns for one in recipe.sources()] == [NAMED, {"prompt": "q", "completion": "a"}, {}]
    assert columns_told(recipe) == [
        "columns of source 1: prompt = customer_question, completion = agent_reply",
        "columns of source 2: prompt = q, completion = a",
        "columns of source 3: their own names",
    ]
    assert columns_told(RowsRecipe(train=["a", "b.csv"])) == []
    for columns in ({"prompt": " "}, {"": "q"}, {"prompt": 3}, "prompt"):
        with pytest.raises(LuthierError):
            make_recipe({"model": "m", "rows": {"train": THEIRS, "columns": columns}})


def test_sets_are_read_with_the_columns_of_the_training_rows_where_they_fit() -> None:
    def fields(**keys: Any) -> dict[str, Any]:
        (found,) = evaluation_sets({"held": EvaluationSet(**keys)}, TrainRecipe(), columns=NAMED)
        return {**found.rows[0].fields, "metric": found.chosen_metric}

    assert fields(rows=THEIRS) == {"prompt": "Is it open?", "completion": "007", "metric": "loss"}
    assert fields(rows=iter(THEIRS)) == fields(rows=THEIRS)
    assert fields(rows=[{"prompt": "a", "answer": "b", "agent_reply": "c"}])["answer"] == ["b"], "not all of them are there"
    own = fields(rows=THEIRS, columns={"prompt": "customer_question", "answer": "agent_reply"})
    assert own == {"prompt": "Is it open?", "answer": ["007"], "metric": "contains"}
    assert fields(rows=[{"text": "x", "customer_question": "q", "agent_reply": "r"}], columns={})["text"] == "x"
    told = _refused(lambda: fields(rows=[{"customer_question": "a", "gold": "b"}]))
    assert told.fix.endswith("since these rows lack some of its columns: name theirs under `columns`")
    assert "rows.columns does not count" not in _refused(lambda: read_as([{"x": 1}], None, None)).fix


def test_rows_are_looked_at_scored_and_chosen_under_their_own_names(tmp_path: Path) -> None:
    path = _table(tmp_path / "a.csv", THEIRS)
    looked = look(path, tiny_tokenizer(), columns=NAMED)
    assert looked.shape_counts == {"prompt+completion": 2} and looked.samples[0].pieces[-3].text == "007"
    chosen = select_rows(path, {"random_rows": {}}, count=1, columns=NAMED, out=tmp_path / "chosen.jsonl")
    assert json.loads((tmp_path / "chosen.jsonl").read_text()) in THEIRS, "what is written keeps its columns"
    assert _whole(read(tmp_path / "chosen.jsonl", columns=NAMED)) == [
        one for one in _whole(read(path, columns=NAMED)) if one[0] == chosen.rows[0].id
    ]
    again = score_rows(path, {"random_rows": {}}, columns=NAMED, target=[THEIRS[1]])
    assert again.facts["also_in_target"] == 1, "the target has the same columns"
    scored = score_rows(path, {"random_rows": {}}, columns=NAMED, column="luck", target=[OURS[0]])
    assert [set(one) for one in scored.records] == [{*THEIRS[0], "luck"}] * 2 and scored.facts["also_in_target"] == 1


def _plan(**rows: Any) -> Plan:
    return make_plan(make_recipe({"model": "tiny:llama", "rows": rows, "train": {"steps": 1, "precision": "fp32"}}))


def test_columns_are_part_of_what_a_run_is() -> None:
    """Another mapping of the same file asks for another run, and rows that were encoded with one are not used for another."""
    one = make_recipe({"model": "m", "rows": {"train": THEIRS, "columns": NAMED}})
    other = make_recipe({"model": "m", "rows": {"train": THEIRS, "columns": {**NAMED, "completion": "ticket"}}})
    assert differences(one.as_plain(), other.as_plain()) == [("rows.columns.completion", "agent_reply", "ticket")]
    assert one.hash() != other.hash()
    sources = [make_recipe({"model": "m", "rows": {"train": [{"rows": "a", "weight": 2.0}, "b"]}}).as_plain() for _ in range(2)]
    for source in sources[1]["rows"]["train"]:
        del source["columns"]
    assert differences(*sources) == [], "a run from before there were columns can go on"


def test_streamed_rows_are_kept_by_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = _table(tmp_path / "a.csv", THEIRS)
    streamed, whole = (_plan(train=str(path), columns=NAMED, streaming=streaming) for streaming in (True, False))
    assert [row.token_ids for row in streamed.rows.rows] == [row.token_ids for row in whole.rows.rows]
    assert "              columns: prompt = customer_question, completion = agent_reply" in whole.lines()
    encoding = Encoding(form_of(tiny_tokenizer()), "assistant", None, "refuse")
    kept = [inputs_of(Streamed("a", path, None, columns), encoding, "stop") for columns in (NAMED, {"text": "agent_reply"}, None)]
    assert len({json.dumps(one, sort_keys=True, default=str) for one in kept}) == 3


def test_commands_take_columns(tmp_path: Path) -> None:
    """What models write beside rows keeps the rows' own columns, and belongs to the same rows read with the same mapping."""
    path, answers, named = (
        _table(tmp_path / "a.csv", THEIRS),
        tmp_path / "answers.jsonl",
        "prompt=customer_question,completion=agent_reply",
    )
    told = [{**row, "worth": [1.0, float(row["score"])]} for row in THEIRS]

    def said(*words: str | Path) -> Any:
        done = CliRunner().invoke(app, ["rows", *map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    assert said("look", path, "--model", "tiny:llama", "--columns", named)["shape_counts"] == {"prompt+completion": 2}
    words = ("--count", "2", "--max-new-tokens", "1", "--columns", named)
    assert said("answers", path, "--model", "tiny:llama", "--out", answers, *words)["rows"] == 2
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [set(one) for one in lines] == [{*THEIRS[0], "answers"}] * 2
    _lines(answers, [{**line, "worth": one["worth"]} for line, one in zip(lines, told, strict=True)])
    assert said("best-of", answers, "--reward", "luck", "--columns", f"{named},luck=worth")["rows"] == 2
    for by in ("score", "select"):
        found = said(
            by,
            path,
            "--by",
            "random_rows",
            "--out",
            tmp_path / f"{by}.jsonl",
            "--columns",
            named,
            *(["--count", "1"] if by == "select" else []),
        )
        assert found["rows"] == 2
    assert said("store", "likelihood", path, "--model", "tiny:llama", "--precision", "fp32", "--columns", named)["new"] == 2
    again = said("store", "likelihood", path, "columns.prompt=customer_question", "columns.completion=agent_reply", "--model", "tiny:llama",
                 "--precision", "fp32")  # fmt: skip
    assert (again["new"], again["kept"]) == (0, 2)


def test_a_plan_says_what_to_write_with_the_columns_of_each_source() -> None:
    recipe = RowsRecipe(
        train=[{"rows": "a.csv", "columns": {"prompt": "q"}}, "b.csv", {"rows": "c.csv", "columns": {}}], columns=NAMED
    )
    assert [_options(recipe, source) for source in ("a.csv", "b.csv", "c.csv")] == [
        {"columns": {"prompt": "q"}},
        {"columns": NAMED},
        {},
    ]
    assert "columns.prompt=q" in command_of("likelihood", "a.csv", "m", {"columns": {"prompt": "q"}})
