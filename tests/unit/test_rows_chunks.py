"""How rows that are streamed are cut into chunks, handed to workers, and known again."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.rows import cache, chunks, stored
from luthier.rows.chat import form_of
from luthier.rows.chunks import Encoding, Records, cut, encode_chunks
from luthier.rows.ids import digest
from luthier.rows.read import read
from luthier.rows.shapes import BadRow
from luthier.rows.sources import Streamed
from luthier.rows.stored import Chunk

RECORDS = [{"prompt": f"What is {i}?", "completion": "x" * (i + 1)} for i in range(40)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MOST_ROWS", 5)


def encoding() -> Encoding:
    return Encoding(form_of(tiny_tokenizer()), "assistant", None, "refuse")


@pytest.mark.usefixtures("small_chunks")
def test_chunks_are_cut_by_rows_and_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(read(RECORDS[:12]))
    bad = BadRow("there", "bad")
    assert [(len(one.rows), len(one.skipped)) for one in cut([*rows[:3], bad, *rows[3:]])] == [(4, 1), (5, 0), (3, 0)]
    monkeypatch.setattr(chunks, "MOST_CHARACTERS", len(repr(rows[0].fields)) + 1)
    assert [len(one.rows) for one in cut(rows[:4])] == [2, 1, 1], "each row is longer than the one before"
    monkeypatch.setattr(chunks, "MOST_CHARACTERS", 2 * len(repr(rows[0].fields)))
    assert [len(one.rows) for one in cut([rows[0]] * 7)] == [2, 2, 2, 1]
    monkeypatch.setattr(chunks, "MOST_CHARACTERS", 2 * len(repr(rows[0].fields)) + 1)
    assert [len(one.rows) for one in cut([rows[0]] * 7)] == [3, 3, 1]


class Pool:
    """Does at once, in this process, what it is given."""

    last: Pool

    def __init__(self, workers: int, *context: Any, initializer: Any, initargs: tuple[Any, ...]) -> None:
        self.done: list[Future[Any]] = []
        self.ended: dict[str, Any] = {}
        self.encoding = initargs[0]
        Pool.last = self

    def submit(self, do: Any, chunk: Records) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(chunks.encode_chunk(chunk, self.encoding))
        self.done.append(future)
        return future

    def shutdown(self, **options: Any) -> None:
        self.ended = options


@pytest.mark.usefixtures("small_chunks")
def test_two_chunks_a_worker_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "ProcessPoolExecutor", Pool)
    encoded = encode_chunks(cut(read(RECORDS)), encoding(), 3)
    next(encoded)
    assert len(Pool.last.done) == 6
    next(encoded)
    assert len(Pool.last.done) == 7
    encoded.close()
    assert Pool.last.ended == {"cancel_futures": True}


def test_rows_are_encoded_in_this_process_unless_others_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chunks, "ProcessPoolExecutor", None)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    assert len(cache.keep([Streamed("rows", str(file))], encoding()).rows.rows) == 40


def test_the_first_and_the_last_mebibyte_of_a_file_are_in_the_key(tmp_path: Path) -> None:
    """Of a shorter file all of it, twice."""
    file = tmp_path / "rows.jsonl"
    for size in (10, 2**20, 3 * 2**20):
        content = (bytes(range(251)) * (size // 251 + 1))[:size]
        file.write_bytes(content)
        assert cache._stamp(file)[-1] == hashlib.sha256(content[: 2**20] + content[-(2**20) :]).hexdigest()
    assert len(cache.key_of({})) == 24


def test_stored_rows_apart_from_their_texts(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    chunk = chunks.encode_chunk(Records(list(read([RECORDS[0], RECORDS[1], pair])), []), encoding())
    stored.write(tmp_path / "new" / "kept", [chunk, chunk], {})
    rows = stored.StoredRows(stored.read(tmp_path / "new" / "kept").batches, {0: "first", 4: "fifth"})
    bare = list(rows.bare())
    assert [row.id for row in bare] == [rows.id_of(place) for place in range(6)] == [row.id for row in rows]
    assert (bare[0].id, bare[4].id, len(stored.StoredRows([]))) == ("first", "fifth", 0)
    assert [len(row.mates) for row in bare] == [0, 0, 1] * 2


def file_of(path: Path, ids: list[str]) -> Streamed:
    path.write_text("".join(json.dumps({"id": one, "text": f"text {one}"}) + "\n" for one in ids))
    return Streamed(path.stem, str(path))


def test_rows_of_several_sources_have_their_places_and_the_first_double_id_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    first, other = file_of(tmp_path / "a.jsonl", list("abcd")), file_of(tmp_path / "b.jsonl", list("efg"))
    assert cache.keep([first, other], encoding()).places == (range(4), range(4, 7))
    for sign in (1, -1):
        double = sorted("abcd", key=lambda one: sign * digest(one))
        with pytest.raises(LuthierError, match=f"two rows have the id `{double[0]}`"):
            cache.keep([first, file_of(tmp_path / f"{sign}.jsonl", double)], encoding())


def test_an_error_counts_all_records_that_were_read() -> None:
    batch, bad = pyarrow.record_batch({"n": [1, 2]}), BadRow("there", "bad")
    good = Chunk(batch, 0, [], [], [bad], {}, {})
    broken = Chunk(batch, 0, [bad, bad], [bad], [bad], {}, {})
    with pytest.raises(LuthierError, match="2 of 9 rows cannot be used"):
        list(cache._judged([good, broken], "rows", "stop"))
    assert len(list(cache._judged([good, broken], "rows", "skip"))) == 2
