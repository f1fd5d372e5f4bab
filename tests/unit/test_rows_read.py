"""Reading rows from every kind of source."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from luthier.errors import LuthierError
from luthier.rows.ids import canonical, digest, digest_of_tokens, numbered, parted
from luthier.rows.read import Rows, files_of, read

RECORDS = [{"prompt": "one", "completion": "1"}, {"prompt": "zwei — 🎉", "completion": "2\u2028b"}]


def _written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    _written(tmp_path / "a.jsonl", _lines(RECORDS))
    _written(tmp_path / "a.ndjson", "\ufeff" + _lines(RECORDS).replace("\n", "\r\n\r\n"))
    _written(tmp_path / "a.json", json.dumps(RECORDS))
    _written(tmp_path / "b.json", json.dumps({"data": RECORDS}))
    _written(tmp_path / "a.jsonl.gz", gzip.compress(_lines(RECORDS).encode()))
    _written(tmp_path / "a.csv", "prompt,completion\none,1\nzwei — 🎉,2\u2028b\n")
    _written(tmp_path / "a.tsv", 'prompt\tcompletion\n"one"\t1\nzwei — 🎉\t2\u2028b\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    expected = read(RECORDS)
    assert [row.fields for row in expected] == RECORDS
    for path in tmp_path.iterdir():
        rows = read(path)
        assert [(row.id, row.fields) for row in rows] == [(row.id, row.fields) for row in expected], path
        assert rows.fingerprint() == expected.fingerprint()
    assert read(datasets.Dataset.from_list(RECORDS)).fingerprint() == expected.fingerprint()
    assert read(record for record in RECORDS).fingerprint() == expected.fingerprint()
    assert read(expected) is expected


def test_rows_are_a_sequence_with_a_name() -> None:
    rows = read([*RECORDS, {"text": "t"}], name="mine")
    assert (len(rows), rows.name, rows[2].fields["text"]) == (3, "mine", "t")
    assert rows.shape_counts == {"prompt+completion": 2, "text": 1}
    assert [row.where for row in rows[:2]] == ["row 1", "row 2"]


def test_names_come_from_files(tmp_path: Path) -> None:
    path = _written(tmp_path / "v1.2-train.jsonl.gz", gzip.compress(_lines(RECORDS).encode()))
    assert read(path).name == "v1.2-train"
    assert read(path)[1].where == f"{path}:2"


def test_ids_follow_the_content_not_the_place() -> None:
    a, b = {"text": "a"}, {"text": "b"}
    first, second = read([a, b]), read([b, a])
    assert [row.id for row in first] == [row.id for row in reversed(second)]
    one = first[0].id
    assert len(one) == 12
    assert [row.id for row in read([a, a, b, a])] == [one, f"{one}-2", first[1].id, f"{one}-3"]
    assert read([{"text": "a", "n": 1}])[0].id != one
    assert first.fingerprint() != second.fingerprint()


def test_own_ids_are_kept_and_must_differ() -> None:
    assert [row.id for row in read([{"id": 7, "text": "a"}, {"id": "x", "text": "b"}])] == ["7", "x"]
    with pytest.raises(LuthierError, match="the id `7` is already that of row 1") as twice:
        read([{"id": 7, "text": "a"}, {"id": "7", "text": "b"}])
    assert twice.value.where == "row 2"
    with pytest.raises(LuthierError, match=r"`id` must be text or a whole number, not 1\.5"):
        read([{"id": 1.5, "text": "a"}])


def test_the_fingerprint_sees_contents_and_columns() -> None:
    prints = {
        read(records, name=name).fingerprint()
        for records, name in (
            ([{"id": "1", "text": "a"}], "n"),
            ([{"id": "1", "text": "a"}], "another name"),
            ([{"id": "1", "text": "b"}], "n"),
            ([{"id": "2", "text": "a"}], "n"),
            ([{"id": "1", "text": "a", "score": 1}], "n"),
        )
    }
    assert len(prints) == 4


def test_bad_lines_stop_with_their_places_or_are_counted(tmp_path: Path) -> None:
    lines = [b'{"text": "ok"}', b'{"text": "cut', b'{"text": ""}', b'{"text": "\xff\xfe"}', b"[1]", b'{"text": "fine"}']
    path = _written(tmp_path / "a.jsonl", b"\n".join(lines))
    with pytest.raises(LuthierError, match="4 of 6 rows cannot be used") as stopped:
        read(path)
    for place, reason in (
        (2, "broken JSON: Unterminated string starting at at column 10"),
        (3, "`text` is empty"),
        (4, "is not valid UTF-8"),
        (5, "each row must be an object of keys and values, not list"),
    ):
        (line,) = [line for line in stopped.value.what.splitlines() if f"{path}:{place}: " in line]
        assert reason in line
    rows = read(path, on_bad_row="skip")
    assert [row.fields["text"] for row in rows] == ["ok", "fine"]
    assert [bad.where for bad in rows.skipped] == [f"{path}:{place}" for place in (2, 3, 4, 5)]


def test_half_a_surrogate_pair_is_found() -> None:
    with pytest.raises(LuthierError, match="is not valid UTF-8"):
        read([{"text": "ab\ud83d"}])


def test_an_empty_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="there are no rows"):
        read(_written(tmp_path / "a.jsonl", "\n\n"))
    with pytest.raises(LuthierError, match="`text` is empty"):
        read([{"text": ""}], on_bad_row="skip")


def test_csv_numbers(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.csv", 'text,score,year,code,label\n7,0.5,1999,007,1\n"a\nb",2,-3,1,0\n')
    first, second = read(path)
    assert first.fields == {"text": "7", "label": 1}
    assert first.columns == {"score": 0.5, "year": 1999, "code": "007", "label": 1}
    assert second.columns == {"score": 2.0, "year": -3, "code": "1", "label": 0}
    assert isinstance(second.columns["score"], float)
    assert (second.fields["text"], second.where) == ("a\nb", f"{path}:4")


def test_csv_rows_and_headers_must_fit(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="the row has 1 values, but the header names 2 columns") as short:
        read(_written(tmp_path / "a.csv", "text,label\na,b\nc\n"))
    assert short.value.where.endswith("a.csv:3")
    with pytest.raises(LuthierError, match="the row has 3 values"):
        read(_written(tmp_path / "a.csv", "text,label\na,b,c\n"))
    with pytest.raises(LuthierError, match="the header names a column twice"):
        read(_written(tmp_path / "a.csv", "text,text\na,b\n"))
    with pytest.raises(LuthierError, match="the file cannot be read"):
        read(_written(tmp_path / "a.csv", 'text\n"a'))


def test_long_csv_values(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(read(path)[0].fields["text"]) == 200_000


def test_folders_patterns_and_documents(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    _written(tmp_path / "b.txt", "second\n")
    _written(tmp_path / "deep" / "c.jsonl", _lines(RECORDS))
    _written(tmp_path / "a.txt", "first")
    _written(tmp_path / "README.rst", "about")
    _written(tmp_path / ".hidden.jsonl", "{")
    rows = read(tmp_path)
    assert [row.fields.get("text") for row in rows] == ["first", "second\n", None, None]
    assert rows.ignored_files == (str(tmp_path / "README.rst"),)
    assert len(read(str(tmp_path / "*.txt"))) == 2
    with pytest.raises(LuthierError, match="no file fits this pattern"):
        read(str(tmp_path / "*.csv"))
    with pytest.raises(LuthierError, match=r"`\.rst` files cannot be read"):
        read(tmp_path / "README.rst")
    with pytest.raises(LuthierError, match="holds no file that can be read"):
        (tmp_path / "empty").mkdir()
        read(tmp_path / "empty")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(_lines(RECORDS).encode())
    for name, content in (("a.jsonl.gz", whole[:-9]), ("b.jsonl.gz", b"no"), ("c.parquet", b"PAR1nothing")):
        with pytest.raises(LuthierError, match="the file cannot be read") as damaged:
            read(_written(tmp_path / name, content))
        assert damaged.value.where.endswith(name)
    with pytest.raises(LuthierError, match="broken JSON") as broken:
        read(_written(tmp_path / "a.json", '[\n{"text": "a"},\n{"text" "b"}]'))
    assert broken.value.where.endswith("a.json:3")
    with pytest.raises(LuthierError, match="neither a list of objects"):
        read(_written(tmp_path / "a.json", "{}"))


def test_sources_that_are_none() -> None:
    with pytest.raises(LuthierError, match="there is no such file or folder") as missing:
        read("nowhere/train")
    assert "hub:nowhere/train" in missing.value.fix
    with pytest.raises(LuthierError, match="rows cannot be read from a DatasetDict") as splits:
        read(datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS)))
    assert "train" in splits.value.fix
    with pytest.raises(LuthierError, match="rows cannot be read from a bytes"):
        read(b"text")  # type: ignore[arg-type]
    with pytest.raises(LuthierError, match="on_bad_row is 'ignore'"):
        read(RECORDS, on_bad_row="ignore")  # type: ignore[arg-type]


def test_values_without_a_stable_form_are_refused() -> None:
    assert read([{"text": "a", "vector": torch.ones(2)}])[0].id == read([{"text": "a", "vector": [1.0, 1.0]}])[0].id
    with pytest.raises(LuthierError, match="a value of the type object"):
        read([{"text": "a", "thing": object()}])
    with pytest.raises(LuthierError, match="the keys of a row must be text"):
        read([{"text": "a", 1: "b"}])  # type: ignore[dict-item]


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("hub:owner/name/main:test")
    assert isinstance(rows, Rows) and rows.name == "owner/name/main:test"
    assert read("hub:name")[0].where == "hub:name 1"
    assert asked == [("owner/name", "main", "test"), ("name", None, "train")]


def test_the_hub_out_of_reach_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(LuthierError, match="could not be loaded: ConnectionError: no route") as offline:
        read("hub:owner/name")
    assert offline.value.where == "hub:owner/name"


def test_errors_show_twenty_letters_before_what_is_broken() -> None:
    """Half a character by itself, and bytes that are no UTF-8, which Python holds as such halves."""
    for broken in ("\ud83d", "\udc80"):
        with pytest.raises(LuthierError) as short:
            read([{"text": f"ab{broken}"}])
        assert short.value.what.startswith("""the text after '{"text":"ab' is not valid UTF-8""")
        with pytest.raises(LuthierError) as long:
            read([{"text": f"-{'0123456789' * 2}{broken}"}])
        assert long.value.what.startswith(f"the text after '{'0123456789' * 2}' is not valid UTF-8")


def test_ids_and_digests_stay_as_they_are() -> None:
    """Stores of numbers name rows by them, and evaluation sets that were measured before."""
    row = read([{"text": "grün", "n": 1}])[0]
    assert (row.id, canonical({"b": "grün", "a": [1]})) == ("e07a41da42b0", '{"a":[1],"b":"grün"}')
    assert (parted(row.id), parted(f"{row.id}-12"), numbered(row.id, 12)) == ((row.id, 1), (row.id, 12), f"{row.id}-12")
    assert (digest("door"), digest("gate")) == (-133722475876699099, -3593463971864021815)
    assert digest_of_tokens([((1, 2), (False, True)), ((4,), (True,))]) == -3250235642046081272


def test_a_set_of_the_hub_that_lies_in_no_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(RECORDS))
    with pytest.raises(LuthierError, match="lies in no files"):
        files_of("hub:owner/name")
