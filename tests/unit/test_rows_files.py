"""Which files are read, and files as other programs write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pytest

from luthier.errors import LuthierError
from luthier.evaluate.planned import evaluation_sets
from luthier.planning.plan import make_plan
from luthier.recipe import EvaluationSet, TrainRecipe, make_recipe
from luthier.rows.read import read

RECORDS = [{"prompt": "Color of snow?", "completion": "white"}, {"prompt": "Color of coal?", "completion": "black"}]


def _written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _line(record: dict[str, str]) -> str:
    return json.dumps(record) + "\n"


def _names(folder: Path | str) -> list[str]:
    return [Path(file).name for file in read(folder).files]


def test_a_folder_trains_on_no_test_split_and_on_no_stray_text(tmp_path: Path) -> None:
    """A folder's test split, its license and its list of sources were learned like its training rows."""
    data = tmp_path / "data"
    for name in ("train.jsonl", "test.jsonl", "dev-0.jsonl", "latest.jsonl", "train_val.jsonl", "validation/a.jsonl"):
        _written(data / name, _line({"text": name}))
    for name in ("LICENSE.txt", "sources.txt", "documents/one.txt", "documents/README.txt"):
        _written(data / name, name)
    rows = read(data)
    assert [row.fields["text"] for row in rows] == ["documents/one.txt", "latest.jsonl", "train.jsonl", "train_val.jsonl"]
    left = {Path(one.file).relative_to(data).as_posix(): one.why for one in rows.left_out}
    testing = "its name says that it is for testing"
    assert left == {
        "LICENSE.txt": "it is about the rows",
        "dev-0.jsonl": testing,
        "documents/README.txt": "it is about the rows",
        "sources.txt": "it is a text beside rows",
        "test.jsonl": testing,
        "validation/a.jsonl": testing,
    }
    assert _names(f"{data}/*.jsonl") == ["latest.jsonl", "train.jsonl", "train_val.jsonl"]
    assert _names(f"{data}/test*") == _names(data / "test.jsonl") == ["test.jsonl"], "who names it gets it"
    assert _names(data / "validation") == ["a.jsonl"]


def test_files_for_testing_are_what_evaluation_wants(tmp_path: Path) -> None:
    """A folder to evaluate on with a training split in it was measured whole, training rows and all."""
    _written(tmp_path / "held" / "test.jsonl", _line(RECORDS[0]))
    assert len(evaluation_sets({"held": EvaluationSet(rows=str(tmp_path / "held"))}, TrainRecipe())[0].rows) == 1
    _written(tmp_path / "held" / "train.jsonl", _line(RECORDS[1]))
    with pytest.raises(LuthierError, match="some files here are for testing and others are not") as mixed:
        evaluation_sets({"held": EvaluationSet(rows=str(tmp_path / "held"))}, TrainRecipe())
    assert mixed.value.fix.endswith("test.jsonl")
    (tmp_path / "held" / "train.jsonl").unlink()
    with pytest.raises(LuthierError, match=r"no file here holds rows to train on: test\.jsonl"):
        read(tmp_path / "held")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_plan_lists_the_files(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing said which files of a folder a run would learn."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    for name in ("train.jsonl", "test.jsonl"):
        _written(tmp_path / "data" / name, _line(RECORDS[0]))
    rows = {"train": str(tmp_path / "data"), "streaming": streaming}
    plan = make_plan(make_recipe({"model": "tiny:llama", "rows": rows, "train": {"steps": 1}}))
    assert [line for line in plan.lines() if line.startswith(("files", "left out"))] == [
        f"files         {tmp_path / 'data' / 'train.jsonl'}",
        f"left out      {tmp_path / 'data' / 'test.jsonl'}: its name says that it is for testing",
    ]


def test_data_sets_that_were_saved_or_cloned(tmp_path: Path) -> None:
    """A folder that `save_to_disk` wrote was refused for the file that describes it."""
    made = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(str(tmp_path / "saved"))
    rows = read(tmp_path / "saved")
    assert [row.fields for row in rows] == RECORDS
    assert {Path(one.file).name for one in rows.left_out if "describes" in one.why} == {
        "dataset_dict.json",
        "dataset_info.json",
        "state.json",
    }
    computed = tmp_path / "saved" / "train" / "cache-0123.arrow"
    computed.write_bytes(next((tmp_path / "saved" / "train").glob("data-*.arrow")).read_bytes())
    assert len(read(tmp_path / "saved" / "train")) == 2, "what was computed with a data set is no part of it"
    with pytest.raises(LuthierError, match="the file describes a data set and holds no rows"):
        read(tmp_path / "saved" / "dataset_dict.json")
    next((tmp_path / "saved" / "train").glob("data-*.arrow")).unlink()
    with pytest.raises(LuthierError, match="is missing, which belongs to the data set"):
        read(tmp_path / "saved")
    _written(tmp_path / "cloned" / "dataset_infos.json", json.dumps({"default": {"features": {}}}))
    _written(tmp_path / "cloned" / "data" / "train-00000-of-00001.jsonl", _line(RECORDS[0]))
    assert _names(tmp_path / "cloned") == ["train-00000-of-00001.jsonl"]
    _written(tmp_path / "cloned" / "data" / "train-00000-of-00001.jsonl", "version https://git-lfs.github.com/spec/v1\nsize 1\n")
    with pytest.raises(LuthierError, match="a pointer of Git LFS"):
        read(tmp_path / "cloned")
    assert len(read(_written(tmp_path / "state.json", json.dumps({"data": RECORDS})))) == 2, "a name alone says nothing"


def test_what_is_packed_is_known_by_its_bytes(tmp_path: Path) -> None:
    """A gzipped file without the ending of one was called broken JSON, line by line."""
    packed = gzip.compress("".join(map(_line, RECORDS)).encode())
    assert [row.fields for row in read(_written(tmp_path / "a.jsonl", packed))] == RECORDS
    datasets.Dataset.from_list(RECORDS).to_parquet(str(tmp_path / "b.json"))
    assert [row.fields for row in read(tmp_path / "b.json")] == RECORDS
    with pytest.raises(LuthierError, match="the file is packed with Zstandard"):
        read(_written(tmp_path / "c.jsonl", b"\x28\xb5\x2f\xfd.."))


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_half_a_character_is_not_the_encoding_of_the_file(tmp_path: Path, ending: str) -> None:
    """Half of a character that a JSON escape wrote was taken for a file that is not UTF-8."""
    for half in (r"\ud83d", r"\udc80"):
        text = '{"text": "smile HALF"}'.replace("HALF", half)
        path = _written(tmp_path / f"a.{ending}", text if ending == "jsonl" else f"[{text}]")
        with pytest.raises(LuthierError) as told:
            read(path)
        assert f"`{half}` is half a character" in told.value.what
        assert "save the file" not in told.value.fix
    whole = '{"text": "smile \\ud83d\\ude00"}'
    assert read(_written(tmp_path / f"a.{ending}", whole if ending == "jsonl" else f"[{whole}]"))[0].fields["text"] == "smile 😀"


def test_tables_as_others_write_them(tmp_path: Path) -> None:
    """Spaces in a header became part of its names, and Windows' line ends part of what is learned."""

    def table(text: str) -> list[dict[str, str]]:
        return [dict(row.fields) for row in read(_written(tmp_path / "a.csv", text))]

    assert table('prompt, completion\nColor of snow?, "white, bright"\n') == [
        {"prompt": "Color of snow?", "completion": "white, bright"}
    ]
    assert table("prompt ,completion\na, b\n") == [{"prompt": "a", "completion": " b"}], "a space before one value is the file's"
    assert table("prompt;completion\na,b;c\n") == [{"prompt": "a,b", "completion": "c"}]
    assert table('prompt,completion\r\n"Two\r\nlines",b\r\n') == [{"prompt": "Two\nlines", "completion": "b"}]
    assert read(_written(tmp_path / "a.csv", "text,n\na,1e999\nb,2\n"))[1].columns == {"n": "2"}, "no number is infinite"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('prompt,completion\nA,b\n"F"x,g\n', 3, "expected after"),
        ('prompt,completion\n"Say \\"hi\\"","hi"\n', 2, r'is written `\"`, and tables write it `""`'),
        ('prompt,completion\nx,y\nA,"b\nC,d\n', 3, "never closes"),
        ('prompt,completion\n"a\nb"x,y\n', 3, "in a row that begins in line 2"),
    ],
)
def test_errors_in_tables_name_the_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    """Quotes that do not fit were told without the line where they stand."""
    path = _written(tmp_path / "a.csv", text)
    with pytest.raises(LuthierError) as told:
        read(path)
    assert (told.value.where, what in told.value.what) == (f"{path}:{line}", True), told.value.what


def test_only_what_may_be_a_name_of_the_hub_is_said_to_be_one() -> None:
    """The advice for a path that is not there was to look for it on the hub."""
    for source, hub in (("owner/name", True), ("name", True), ("../rows.jsonl", False), ("rows.jsonl", False), ("a/b/c", False)):
        with pytest.raises(LuthierError) as error:
            read(source)
        assert ("`hub:" in error.value.fix) == hub


def test_files_of_a_folder_that_only_look_like_others(tmp_path: Path) -> None:
    """An Arrow file without a `state.json` beside it holds rows; so may a file that is named as a description and is none."""
    table = pyarrow.Table.from_pylist(RECORDS)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    with (
        pyarrow.OSFile(str(tmp_path / "deep" / "er" / "a.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    assert [row.fields for row in read(tmp_path / "deep")] == RECORDS
    assert _names(f"{tmp_path}/**/*.arrow") == ["a.arrow"]
    _written(tmp_path / "deep" / "dataset_info.json", "[")
    with pytest.raises(LuthierError, match="broken JSON"):
        read(tmp_path / "deep")


def test_nulls_within_values_are_those_of_columns_alone() -> None:
    record = {"text": "a", "about": {"n": 1, "m": None}}
    assert read([record])[0].fields["about"] == {"n": 1, "m": None}
    assert read(datasets.Dataset.from_list([record]))[0].fields["about"] == {"n": 1}


def test_what_is_wrong_with_a_line_is_told_in_words_of_rows(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="JSON that cannot be read: Exceeds the limit") as long:
        read(_written(tmp_path / "a.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}"))
    assert "sys." not in long.value.what
    with pytest.raises(LuthierError, match="is not valid UTF-8") as bytes_:
        read(_written(tmp_path / "b.jsonl", b'{"text": "\\ud83d\\ude00 \xff"}'))
    assert bytes_.value.fix.startswith("save the file as UTF-8")
    with pytest.raises(LuthierError, match="expected after") as table:
        read(_written(tmp_path / "c.csv", 'prompt,completion\n"F"x,g\n'))
    assert "begins" not in table.value.what
