"""Junk in recipes, rows and run folders gives a result or the one error that names place and remedy, never another exception."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from luthier import registry
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.recipe import Recipe, make_recipe, read_recipe
from luthier.recipe.parts import choose_parts
from luthier.results.folder import list_runs, read_run
from luthier.rows.encode import encode_all
from luthier.rows.read import read

PATIENT = settings(derandomize=True, deadline=None, max_examples=150, database=None, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = st.integers() | st.sampled_from([10**400, -1, 0, 2**63]) | st.floats()
WORDS = st.sampled_from(["", " ", "tiny:llama", "half", "lora", "hub:", "*", "\0", "true", "1e3", "n" * 5000, "~", "/", "../x"])
PLAIN = st.none() | st.booleans() | NUMBERS | st.text() | WORDS
JUNK = st.recursive(
    PLAIN, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=5), one, max_size=3), max_leaves=6
)

VALID: dict[str, Any] = {
    "name": "small",
    "model": "tiny:llama",
    "seed": 3,
    "rows": {"train": "rows.jsonl", "format": "text", "max_length": 64, "loss_on": "last"},
    "tune": {"lora": {"rank": 4, "target_modules": ["linear"]}},
    "objective": "cross_entropy",
    "optimizer": ["clip", {"adamw": {"weight_decay": 0.1}}],
    "gradient_estimator": "backprop",
    "train": {"steps": 2, "learning_rate": 1e-3, "warmup": 0.1, "precision": "fp32", "best": "asked", "evaluate_every": 1},
    "evaluate": {"asked": {"rows": "asked.jsonl", "metric": "loss", "limit": 3}},
}


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or None where it was refused with its one error."""
    try:
        return call()
    except LuthierError as error:
        assert type(error) is LuthierError and error.what
        return None


def _paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(path for key, one in inner for path in _paths(one, (*before, key)))]


@st.composite
def spoiled(draw: st.DrawFn, valid: Any) -> Any:
    """Valid data with up to three of its places dropped, replaced or added to."""
    data = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, 3))):
        places = [path for path in _paths(data) if path]
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        here = data
        for key in path:
            here = here[key]
        deed = draw(st.sampled_from(["drop", "replace", "add"]))
        if deed == "drop":
            del here[last]
        elif deed == "add" and isinstance(here, dict):
            here[draw(st.text(max_size=8) | st.sampled_from(["tun", "rows", "train", "rank"]))] = draw(JUNK)
        else:
            here[last] = draw(JUNK)
    return data


@PATIENT
@given(
    spoiled(VALID), st.lists(st.text(max_size=20) | st.sampled_from(["tune.lora.rank=3", "optimizer.clip=1", "a=*b", "x=&a [*a]"]))
)
def test_recipes(data: Any, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        for words in ([], overrides):
            recipe = attempt(lambda words=words: read_recipe(path, words))
            if recipe is not None:
                assert isinstance(recipe, Recipe)
                assert make_recipe(yaml.safe_load(recipe.as_yaml())).hash() == recipe.hash(), "a recipe reads back"
                attempt(lambda recipe=recipe: choose_parts(recipe))


@PATIENT
@given(st.binary(max_size=200) | st.text(alphabet="abc:-[]{}&*!?|>'\"%#@, \n\t0", max_size=60).map(str.encode))
def test_recipe_files_of_anything(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(content)
        attempt(lambda: read_recipe(path))


TECHNIQUES = sorted((kind, name) for kind in registry.KINDS if registry.key_of(kind) for name in registry.names(kind))


@PATIENT
@given(st.data())
def test_options_of_techniques(data: st.DataObject) -> None:
    kind, name = data.draw(st.sampled_from(TECHNIQUES))
    known = list(registry.options_model(registry.find(name, (kind,)).factory).model_fields)
    options = data.draw(st.dictionaries(st.sampled_from([*known, "unknown"]) if known else st.text(max_size=5), JUNK, max_size=3))
    key = registry.key_of(kind)
    spec = {name: data.draw(st.just(options) | JUNK)}
    asked = {"model": "tiny:llama", "rows": {"train": "rows.jsonl"}, **({} if key == "rows.map" else {key: spec})}
    recipe = make_recipe(asked)
    attempt(lambda: choose_parts(recipe))


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAPES: list[dict[str, Any]] = [
    {"messages": MESSAGES, "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
    {"prompt": "a", "completion": "b"},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    {"instruction": "a", "input": "b", "output": "c"},
    {"text": "a"},
    {"text": "a", "label": 1},
    {"prompt": "a", "answer": ["b", "c"]},
    {"question": "a", "choices": ["b", "c"], "answer": 1},
]
FIELDS = sorted({key for shape in SHAPES for key in shape} | {"id", "chosen", "rejected"})
TOKENIZER = tiny_tokenizer()
WHOLE = "".join(json.dumps({**shape, "id": str(number)}) + "\n" for number, shape in enumerate(SHAPES)).encode()


def check_rows(name: str, content: bytes) -> None:
    """Reading and encoding a file, both ways of treating bad rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        for on_bad_row in ("stop", "skip"):
            rows = attempt(lambda how=on_bad_row: read(path, on_bad_row=how))
            if rows is not None:
                assert len({row.id for row in rows}) == len(rows) > 0
                assert rows.fingerprint()
                encoded = attempt(lambda how=on_bad_row, rows=rows: encode_all(rows, TOKENIZER, max_length=64, on_bad_row=how))
                assert encoded is None or len(encoded.rows) + len(encoded.dropped) == len(rows), "every row is accounted for"


ENDINGS = st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt"])


@PATIENT
@given(ENDINGS | st.sampled_from(["rows.parquet", "rows.jsonl.gz", "rows.csv.gz"]), st.binary(max_size=300))
def test_row_files_of_anything(name: str, content: bytes) -> None:
    check_rows(name, content)


@PATIENT
@given(ENDINGS, st.data())
def test_damaged_row_files(name: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        deed = data.draw(st.sampled_from(["flip", "cut", "double", "insert"]))
        if deed == "flip" and content:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif deed == "cut":
            del content[place : place + data.draw(st.integers(1, 200))]
        elif deed == "double":
            start = content.rfind(b"\n", 0, place) + 1
            content[start:start] = content[start : content.find(b"\n", place) + 1]
        else:
            content[place:place] = data.draw(st.binary(max_size=5))
    check_rows(name, bytes(content))


@PATIENT
@given(
    st.lists(
        st.one_of([spoiled(shape) for shape in SHAPES]) | st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=4), max_size=4
    ),
    st.booleans(),
)
def test_rows_of_junk(rows: list[Any], as_list: bool) -> None:
    text = json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    check_rows("rows.json" if as_list else "rows.jsonl", text.encode())


@PATIENT
@given(
    st.lists(
        st.lists(st.text(max_size=8) | st.sampled_from(["prompt", "completion", "text", "label", "1", "9" * 5000]), max_size=4)
    )
)
def test_tables_of_junk(table: list[list[str]]) -> None:
    text = "\n".join(",".join(row) for row in table)
    check_rows("rows.csv", text.encode(errors="surrogatepass"))


RUN: dict[str, Any] = {
    "name": "small",
    "run": "runs/small-1",
    "status": "finished",
    "started": "2026-01-02T03:04:05+00:00",
    "recipe": {"model": "tiny:llama", "rows": {"train": "rows.jsonl"}, "evaluate": {"asked": {"max_new_tokens": 4}}},
    "rows": {"overlap": {"asked": 1}},
    "trained_parameters": 10,
    "total_parameters": 20,
    "seconds": 1.5,
    "supervised_tokens": 40,
    "supervised_tokens_per_second": 20.5,
    "peak_memory_bytes": 1000,
    "final_loss": 2.5,
    "retained": 0.5,
    "warnings": ["beware"],
    "repeat_baseline": {"asked": 0.1},
    "delta": {"relative": 0.1, "changed_share": 0.5},
    "history": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}],
    "metrics": {
        "asked": {
            "metric": "contains",
            "role": "retention",
            "higher_is_better": True,
            "n": 1,
            "before": 0.0,
            "before_interval": [0.0, 0.5],
            "after": 1.0,
            "after_interval": [0.5, 1.0],
            "difference": 1.0,
            "difference_interval": None,
            "verdict": "better",
            "retained": None,
            "items": [
                {"id": "x", "prompt": "a", "expected": ["b"], "before": "c", "after": "b", "before_score": 0, "after_score": 1}
            ],
        }
    },
}


@settings(PATIENT, max_examples=70)
@given(spoiled(RUN) | JUNK)
def test_facts_of_runs(facts: Any) -> None:
    check_run(json.dumps(facts).encode())


@PATIENT
@given(st.binary(max_size=100))
def test_run_files_of_anything(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place_run(Path(folder, "odd"), content)
        odd = attempt(lambda: read_run("odd", folder))
        (listed,) = list_runs(folder)
        assert odd is not None or listed.facts == {"name": "odd", "status": "damaged"}


def place_run(folder: Path, content: bytes) -> None:
    """A run's folder with some facts."""
    folder.mkdir()
    (folder / "run.json").write_bytes(content)


def check_run(content: bytes) -> None:
    """Every view of a run from elsewhere: listed, shown, compared."""
    with tempfile.TemporaryDirectory() as folder:
        place_run(Path(folder, "odd"), content)
        place_run(Path(folder, "whole"), json.dumps(RUN).encode())
        assert {run.folder.name for run in list_runs(folder)} == {"odd", "whole"}, "a damaged run is listed as such"
        expected = 2 if attempt(lambda: read_run("odd", folder)) is None else 0
        views = [["compare", "whole", "odd", "--page", f"{folder}/page.html"]]
        views += [[*words, *form] for words in (["runs", "odd"], ["compare", "odd", "whole"]) for form in ([], ["--json"])]
        for words in views if expected == 0 else views[:2]:
            result = CliRunner().invoke(app, [*words, "--folder", folder])
            assert result.exit_code == expected, (words, result.exception, result.output)
        for form in ([], ["--json"]):
            result = CliRunner().invoke(app, ["runs", "--folder", folder, *form])
            assert result.exit_code == 0, (result.exception, result.output)


def test_the_valid_ones_are_valid(tmp_path: Path) -> None:
    """What the tests above spoil is whole."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(VALID))
    choose_parts(read_recipe(tmp_path / "recipe.yaml"))
    (tmp_path / "rows.jsonl").write_bytes(WHOLE)
    assert len(read(tmp_path / "rows.jsonl")) == len(SHAPES)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert read_run(tmp_path).facts == RUN
    with pytest.raises(LuthierError):
        read_run(tmp_path / "none", tmp_path)
