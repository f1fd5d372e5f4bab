"""Rows in a file instead of in memory: the same rows, the same steps, the same errors, in little memory."""

from __future__ import annotations

import ast
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

import luthier
from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows import cache, chunks
from luthier.rows.cache import Kept, code_fingerprint, folder_of, inputs_of, keep, key_of
from luthier.rows.chat import form_of
from luthier.rows.chunks import Encoding, Records, cut, encode_chunks
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.rows.sources import Joined, Streamed, read_rows
from luthier.rows.stored import FACTS, ROWS, StoredRows

RECORDS: list[dict[str, Any]] = [
    *({"prompt": f"What is {i}?", "completion": "x" * (i + 1), "score": i / 7, "kind": "a" if i % 2 else "b"} for i in range(40)),
    {
        "messages": [
            {"role": "user", "content": "é🎉"},
            {"role": "assistant", "content": "a\u2028"},
            {"role": "assistant", "content": "b"},
        ]
    },
    {"text": "a document"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MOST_ROWS", 5)


def written(path: Path, records: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in (RECORDS if records is None else records)), encoding="utf-8")
    return path


def encoding_of(**changed: Any) -> Encoding:
    return replace(Encoding(form_of(tiny_tokenizer()), "assistant", None, "refuse"), **changed)


def kept(*paths: Path, workers: int = 0, on_bad_row: Any = "stop", **changed: Any) -> Kept:
    sources = [Streamed(path.stem, str(path)) for path in paths]
    return keep(sources, encoding_of(**changed), on_bad_row=on_bad_row, workers=workers)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "folder of documents"])
def test_the_rows_are_those_in_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        written(path)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:40]), path)
    elif kind == "csv":
        path.write_text("prompt,completion,n,code\n" + "".join(f"q{i},a{i},{i},00{i}\n" for i in range(12)))
    else:
        path.mkdir()
        for i in range(12):
            (path / f"{i}.txt").write_text("words " * (i + 1))
    expected = encode_all(read(path), tiny_tokenizer(), max_length=60, too_long="right")
    found = kept(path, max_length=60, too_long="right").rows
    assert tuple(found.rows) == expected.rows and len(found.rows) == len(expected.rows) > 10
    assert (found.rows[-1], found.rows[2:4]) == (expected.rows[-1], expected.rows[2:4])
    assert [list(one) for one in found.sizes] == [list(one) for one in expected.sizes]
    assert (found.truncated, found.dropped) == (expected.truncated, expected.dropped)
    assert (found.notes, found.first_noted) == (expected.notes, expected.first_noted)
    with pytest.raises(IndexError):
        found.rows[len(found.rows)]


def recipe(tmp_path: Path, **rows: Any) -> dict[str, Any]:
    train = {"epochs": 2.5, "batch_rows": 8, "precision": "fp32", "learning_rate": 1e-3, "save_every": 4}
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    if not a.exists():
        written(a, RECORDS[:30])
        written(b, RECORDS[30:])
    sources = [str(a), {"rows": str(b), "weight": 1}]
    return {"model": "tiny:llama", "rows": {"train": sources, **rows}, "out": str(tmp_path / "runs"), "train": train}


@pytest.mark.usefixtures("small_chunks")
def test_a_streamed_run_is_the_run_in_memory(tmp_path: Path) -> None:
    """Fault 27: streamed rows give the same steps, losses and weights bit for bit, also when resumed in the middle of an epoch."""
    sets = {"asked": {"rows": [{"prompt": RECORDS[3]["prompt"], "answer": "xxxx"}], "metric": "contains", "max_new_tokens": 2}}
    whole = luthier.train({**recipe(tmp_path), "evaluate": sets})
    streamed = luthier.train({**recipe(tmp_path, streaming=True), "evaluate": sets})

    class EnoughError(Exception):
        pass

    def stop(plan: Any, progress: Any, result: Any) -> None:
        if progress.step == 5:
            raise EnoughError

    with pytest.raises(EnoughError):
        luthier.train({**recipe(tmp_path, streaming=True), "evaluate": sets}, tell=stop)
    resumed = luthier.train({**recipe(tmp_path, streaming=True), "evaluate": sets}, resume=tmp_path / "runs" / "run-3")
    losses = [line["loss"] for line in whole.facts["history"]]
    for run in (streamed, resumed):
        assert [line["loss"] for line in run.facts["history"]] == losses
        assert run.facts["weights_sha256"] == whole.facts["weights_sha256"]
        assert run.facts["rows"]["overlap"] == whole.facts["rows"]["overlap"] == {"asked": 1}
    assert streamed.facts["rows"]["cache"] == ["a: rows cache: miss", "b: rows cache: miss"]
    assert resumed.facts["rows"]["cache"] == ["a: rows cache: hit", "b: rows cache: hit"]


def test_fault_31_the_key_follows_from_everything_rows_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 31: another file, template, tokenizer, length, target, shape or code is another key; another mixture is not."""
    path = written(tmp_path / "a.jsonl")
    source, base = Streamed("a", str(path)), encoding_of()

    def key(source: Streamed = source, encoding: Encoding = base, on_bad_row: Any = "stop") -> str:
        return key_of(inputs_of(source, encoding, on_bad_row))

    template: Any = tiny_tokenizer()
    template.chat_template = template.chat_template.replace("user", "human") + " "
    vocabulary: Any = tiny_tokenizer()
    vocabulary.add_tokens(["another"])
    special: Any = tiny_tokenizer()
    special.eos_token = "<|other|>"
    keys = {
        "base": key(),
        "path": key(Streamed("a", str(written(tmp_path / "copy.jsonl")))),
        "shape": key(replace(source, shape="text")),
        "template": key(encoding=encoding_of(form=form_of(template))),
        "template options": key(encoding=encoding_of(form=form_of(tiny_tokenizer(), {"thinking": True}))),
        "vocabulary": key(encoding=encoding_of(form=form_of(vocabulary))),
        "special tokens": key(encoding=encoding_of(form=form_of(special))),
        "max_length": key(encoding=encoding_of(max_length=9)),
        "too_long": key(encoding=encoding_of(too_long="left")),
        "loss_on": key(encoding=encoding_of(loss_on="all")),
        "on_bad_row": key(on_bad_row="skip"),
    }
    assert key(Streamed("another name", str(path)), encoding_of()) == keys["base"], "a name changes no row"
    base.form.tokenizer(["a", "long text"], padding=True, truncation=True, max_length=3)
    assert key() == keys["base"], "how others used the tokenizer changes no row"
    for name, module in (("luthier", luthier), ("transformers", cache.transformers), ("tokenizers", cache.tokenizers)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.0")
            keys[name] = key()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "code_fingerprint", lambda: "other code")
        keys["code"] = key()
    assert key() == keys["base"]
    about = path.stat()
    path.write_text(path.read_text().replace("What", "Whot", 1))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    keys["content of the same size and time"] = key()
    os.utime(path, ns=(0, 0))
    keys["time"] = key()
    written(path, RECORDS[1:])
    keys["content"] = key()
    assert len(set(keys.values())) == len(keys), keys


def test_a_file_that_was_copied_over_is_another_one(tmp_path: Path) -> None:
    """A change in the middle of a large file, of the same size and with its time kept, gave the rows of the file before."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a" * 3 * 2**20)
    before, about = cache._stamp(path), path.stat()
    with path.open("r+b") as file:
        file.seek(3 * 2**19)
        file.write(b"b")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_mtime_ns == about.st_mtime_ns and cache._stamp(path) != before


@pytest.mark.parametrize("name", ["chat", "chunks", "encode", "ids", "read", "shapes", "stored", "cache"])
def test_any_change_to_the_encoding_code_is_another_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 31: the code's version follows from its source."""
    before, source = code_fingerprint(), inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: source(module) + "#" * (module.__name__ == f"luthier.rows.{name}"))
    assert code_fingerprint() != before


def test_the_encoding_code_is_all_that_the_cache_reaches_by_its_imports() -> None:
    """A module of rows that a new import brings in and the version forgets would leave old rows in use after a change to it."""
    folder = Path(cache.__file__).parent
    known = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    reached, left = set[str](), ["cache"]
    while left:
        name = left.pop()
        reached.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            package, _, inside = (getattr(node, "module", None) or "").rpartition(".")
            imported = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) and inside == "rows" else {inside}
            left += (imported & known) - reached if package.startswith("luthier") else []
    assert reached == set(cache._CODE)


def test_kept_rows_are_found_again_and_another_mixture_uses_them(tmp_path: Path, own_cache: Path) -> None:
    def planned(**rows: Any) -> list[str]:
        return list(make_plan(make_recipe(recipe(tmp_path, streaming=True, **rows))).cache)

    assert planned() == ["a: rows cache: miss", "b: rows cache: miss"]
    assert planned() == ["a: rows cache: hit", "b: rows cache: hit"]
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert planned(train=[{"rows": b, "weight": 5}, {"rows": a, "weight": 2}]) == ["b: rows cache: hit", "a: rows cache: hit"]
    assert planned(loss_on="all") == ["a: rows cache: miss", "b: rows cache: miss"]
    assert not list(own_cache.glob("*.partial"))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": lambda folder: flip(folder / ROWS, -2000),
    "a flipped bit in the lengths": lambda folder: flip(folder / ROWS, (folder / ROWS).stat().st_size // 2),
    "a file cut short": lambda folder: os.truncate(folder / ROWS, (folder / ROWS).stat().st_size // 2),
    "no rows": lambda folder: (folder / ROWS).unlink(),
    "no facts": lambda folder: (folder / FACTS).unlink(),
    "broken facts": lambda folder: (folder / FACTS).write_text("{"),
    "facts of something else": lambda folder: (folder / FACTS).write_text("[]"),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_mended(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path / "a.jsonl")
    expected = tuple(kept(path).rows.rows)
    folder = folder_of(inputs_of(Streamed("a", str(path)), encoding_of(), "stop"))
    DAMAGE[damage](folder)
    again = kept(path)
    assert again.said[0].startswith("a: rows cache: damaged (") and again.said[0].endswith("), written again")
    assert tuple(again.rows.rows) == expected
    assert kept(path).said == ("a: rows cache: hit",)


def refusal(act: Callable[[], object]) -> dict[str, str]:
    with pytest.raises(LuthierError) as caught:
        act()
    return caught.value.as_json()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_stop_as_in_memory(tmp_path: Path, workers: int, own_cache: Path) -> None:
    unreadable = tmp_path / "unreadable.jsonl"
    unreadable.write_text(json.dumps(RECORDS[0]) + "\n{broken\n" + json.dumps({"prompt": "", "completion": "b"}) + "\n")
    told = refusal(lambda: kept(unreadable, workers=workers))
    assert told == refusal(lambda: read(unreadable)) and f"{unreadable}:2" in told["error"]
    long = written(tmp_path / "long.jsonl")
    told = refusal(lambda: kept(long, max_length=60, workers=workers))
    assert told == refusal(lambda: encode_all(read(long), tiny_tokenizer(), max_length=60)) and f"{long}:" in told["where"]
    assert not multiprocessing.active_children() and not [one for one in own_cache.iterdir() if one.is_dir()], "nothing is left"


def test_bad_rows_are_skipped_and_counted_as_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "{broken\n")
    rows = read(path, on_bad_row="skip")
    expected = encode_all(rows, tiny_tokenizer(), max_length=60, on_bad_row="skip")
    for _ in range(2):
        found = kept(path, max_length=60, on_bad_row="skip")
        assert (found.skipped, found.rows.dropped) == (rows.skipped, expected.dropped)
        assert found.skipped[0].where == f"{path}:43" and len(expected.dropped) > 5
        assert tuple(found.rows.rows) == expected.rows
    for text, error in (("", "there are no rows"), ("{broken\n", "broken JSON"), ('{"prompt": "a"}\n', "no one answer to learn")):
        path.write_text(text)
        assert error in refusal(lambda: kept(path, on_bad_row="skip"))["error"]


def test_an_id_comes_once(tmp_path: Path) -> None:
    twice = written(tmp_path / "twice.jsonl", [{**RECORDS[0], "id": "one"}, {**RECORDS[1], "id": "one"}])
    assert "the id `one` is already that of an earlier row" in refusal(lambda: kept(twice))["error"]
    same = written(tmp_path / "same.jsonl", [RECORDS[0]] * 3)
    assert [row.id for row in kept(same).rows.rows] == [row.id for row in read(same)], "copies are numbered"
    a = written(tmp_path / "a.jsonl", [{**RECORDS[i], "id": f"a{i}"} for i in range(5)])
    b = written(tmp_path / "b.jsonl", [{**RECORDS[9], "id": "a3"}, {**RECORDS[8], "id": "a1"}])
    told = refusal(lambda: kept(a, b))
    assert told["error"] == "two rows have the id `a3`" and told["where"] == f"{a}:4 and {b}:1"
    told_in_memory = refusal(lambda: make_plan(make_recipe({"model": "tiny:llama", "rows": {"train": [str(a), str(b)]}})))
    assert told == told_in_memory


def test_what_cannot_be_streamed_is_refused_by_name(tmp_path: Path) -> None:
    def planned(**rows: Any) -> dict[str, str]:
        return refusal(
            lambda: make_plan(make_recipe({"model": "tiny:llama", "rows": {"train": RECORDS, "streaming": True, **rows}}))
        )

    assert planned()["where"] == "rows.streaming" and planned(map="twice")["where"] == "rows.map"
    assert planned(streaming=False, workers=2)["where"] == "rows.workers"
    assert "no such file" in planned(train=str(tmp_path / "none.jsonl"))["error"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    assert "LUTHIER_CACHE" in refusal(lambda: kept(written(tmp_path / "a.jsonl")))["fix"]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing_and_end(tmp_path: Path, workers: int) -> None:
    """Fault 27: rows encoded by 0, 2 and 4 workers are the same file, byte for byte."""
    path = written(tmp_path / "a.jsonl")
    folder = folder_of(inputs_of(Streamed("a", str(path)), encoding_of(), "stop"))
    kept(path)
    alone = (folder / ROWS).read_bytes()
    (folder / FACTS).unlink()
    assert "damaged" in kept(path, workers=workers).said[0]
    assert (folder / ROWS).read_bytes() == alone
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("small_chunks")
def test_workers_end_when_nobody_wants_more_and_a_killed_one_is_named() -> None:
    def endless() -> Iterator[Records]:
        while True:
            yield from cut(read(RECORDS))

    encoded = encode_chunks(endless(), encoding_of(), 2)
    assert len(StoredRows([next(encoded).batch, next(encoded).batch])) == 10
    encoded.close()
    assert not multiprocessing.active_children()
    encoded = encode_chunks(endless(), encoding_of(), 2)
    next(encoded)
    multiprocessing.active_children()[0].kill()
    with pytest.raises(LuthierError, match="a process that encodes rows ended"):
        for _ in encoded:
            pass
    assert not multiprocessing.active_children()


ENDLESS = """
import signal
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.chat import form_of
from luthier.rows.chunks import Encoding, cut, encode_chunks
from luthier.rows.read import read

def endless():
    while True:
        yield from cut(read([{"prompt": "a", "completion": "b"}]))

if __name__ == "__main__":
    # Whoever runs the tests in the background may have interrupts ignored, and processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in encode_chunks(endless(), Encoding(form_of(tiny_tokenizer()), "assistant", None, "refuse"), 1):
        print("encoded", flush=True)
"""


def test_workers_end_with_the_process_that_began_them(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    env = {**os.environ, "PYTHONPATH": str(Path(luthier.__file__).parent.parent)}
    # In a session of its own, so that the signal reaches this one process and not its workers.
    processes = {
        number: subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )
        for number in (signal.SIGINT, signal.SIGKILL)
    }
    for process in processes.values():
        assert process.stdout is not None and process.stdout.readline() == b"encoded\n"
    for number, process in processes.items():
        process.send_signal(number)
        # Workers have the same output: it closes when the last of them has ended.
        process.communicate(timeout=60)
        assert process.returncode != 0


MEASURED = """
import sys
from pathlib import Path
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.cache import keep
from luthier.rows.chat import form_of
from luthier.rows.chunks import Encoding
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.rows.sources import Joined, Streamed, read_rows
from luthier.training.feed import Feed

def resident():
    # Pages of a mapped file do not count: they are the system's to drop.
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

tokenizer = tiny_tokenizer()

def fed(path):
    if sys.argv[3] == "streamed":
        rows = keep([Streamed("a", path)], Encoding(form_of(tokenizer), "assistant", None, "refuse")).rows
    else:
        rows = encode_all(read(path), tokenizer)
    feed = Feed(rows, 0, 4096, batch_rows=8)
    return sum(int(batch.attend_BT.sum()) for step in range(2) for batch in feed.at(step)[1]), rows

fed(sys.argv[2])
before = resident()
tokens, rows = fed(sys.argv[1])
print(resident() - before, rows.tokens, tokens)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
def test_streaming_takes_little_memory(tmp_path: Path) -> None:
    # What a chunk takes while it is encoded does not grow with the set: the small one fills a chunk already.
    small, large = (
        written(tmp_path / f"{count}.jsonl", [{"text": f"{i} " + "many words " * 40} for i in range(count)])
        for count in (800, 3000)
    )

    def grown(how: str) -> tuple[int, tuple[int, int]]:
        script = [sys.executable, "-c", MEASURED, str(large), str(small), how]
        told = subprocess.run(script, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        kibibytes, tokens, of_two_steps = map(int, told.stdout.split())
        return kibibytes, (tokens, of_two_steps)

    (in_memory, tokens), (streamed, same) = grown("in memory"), grown("streamed")
    assert tokens == same and tokens[0] > 1_000_000
    assert streamed < in_memory / 3, (streamed, in_memory)


def test_the_same_row_in_two_sources_gets_a_second_id_in_memory_and_streamed(tmp_path: Path) -> None:
    """Rows without ids that stand in two sources were refused for ids that nobody had given them."""
    a = written(tmp_path / "a.jsonl", [RECORDS[0], RECORDS[1], RECORDS[0]])
    b = written(tmp_path / "b.jsonl", [RECORDS[0], {**RECORDS[2], "id": "own"}, RECORDS[0]])
    c = written(tmp_path / "c.jsonl", [RECORDS[1], RECORDS[0]])
    recipe = make_recipe({"model": "tiny:llama", "rows": {"train": [str(a), str(b), str(c)]}})
    in_memory = [row.id for row in Joined(read_rows(recipe.rows))]
    first, second = in_memory[:2]
    assert in_memory == [first, second, *(f"{first}-2", f"{first}-3", "own", f"{first}-4"), f"{second}-2", f"{first}-5"]
    assert [row.id for row in kept(a, b, c).rows.rows] == in_memory


def test_rows_are_encoded_without_what_models_are_made_of() -> None:
    """Every worker loaded all that loads models, which took as long as encoding some thousand rows."""
    heavy = ("luthier.models", "luthier.training", "luthier.tune", "transformers.models")
    rows = Path(luthier.__file__).parent / "rows"
    seen: set[str] = set()
    todo = ["chunks"]
    while todo:
        module = todo.pop()
        seen.add(module)
        for node in ast.parse((rows / f"{module}.py").read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith(heavy) for name in names), f"{module} imports {names}"
            inside = {name.removeprefix("luthier.rows.") for name in names if name.startswith("luthier.rows.")}
            todo += sorted(inside - seen)
    assert {"encode", "chat", "limits"} <= seen


def test_tokenizers_of_one_vocabulary_that_cut_differently_are_two() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    assert cache.tokenizer_fingerprint(one) == cache.tokenizer_fingerprint(other)
    other.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    assert one.get_vocab() == other.get_vocab() and cache.tokenizer_fingerprint(one) != cache.tokenizer_fingerprint(other)
