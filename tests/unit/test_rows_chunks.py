"""How rows that are streamed are cut into chunks, handed to workers, and known again."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from luthier.models.tiny import tiny_tokenizer
from luthier.rows import cache, chunks
from luthier.rows.chat import form_of
from luthier.rows.chunks import Encoding, Records, cut, encode_chunks
from luthier.rows.read import read
from luthier.rows.shapes import BadRow
from luthier.rows.sources import Streamed

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
