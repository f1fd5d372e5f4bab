"""Bad recipes and bad rows: every one is refused with its place and its remedy before anything trains."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.recipe import read_recipe
from tests.faults.bad_input import ASKED, MISSING, ROWS, Content, lines, put, refused, refused_to_train, write_recipe

# What is changed in a valid recipe, the words of the place, a word of the remedy.
RECIPES: list[tuple[dict[str, Any], str, str]] = [
    ({"modle": "tiny:llama"}, "recipe.yaml: modle", "`model`"),
    ({"rows.trian": "rows.jsonl"}, "recipe.yaml: rows.trian", "`train`"),
    ({"train.epohcs": 2}, "recipe.yaml: train.epohcs", "`epochs`"),
    ({"evaluate.asked.metrik": "loss"}, "recipe.yaml: evaluate.asked.metrik", "`metric`"),
    ({"model": MISSING}, "recipe.yaml: model", "add `model"),
    ({"model": ""}, "recipe.yaml: model", "a hub name"),
    ({"model": 3}, "recipe.yaml: model", "text"),
    ({"rows": MISSING}, "recipe.yaml: rows", "add `rows"),
    ({"rows": ["rows.jsonl"]}, "recipe.yaml: rows", "a mapping"),
    ({"rows.train": MISSING}, "recipe.yaml: rows.train", "add `train"),
    ({"rows.train": None}, "recipe.yaml: rows.train", "a file"),
    ({"rows.train": ""}, "recipe.yaml: rows.train", "a file"),
    ({"rows.train": []}, "recipe.yaml: rows.train", "a file"),
    ({"rows.train": ["rows.jsonl", 3]}, "recipe.yaml: rows.train", "a file"),
    ({"rows.loss_on": "asistant"}, "recipe.yaml: rows.loss_on", "`assistant`"),
    ({"rows.max_length": 1}, "recipe.yaml: rows.max_length", "at least 2"),
    ({"rows.max_length": 513}, "rows.max_length", "at most 512"),
    ({"rows.format": "mesages"}, "rows.format", "`messages`"),
    ({"rows.on_bad_row": "ignore"}, "recipe.yaml: rows.on_bad_row", "skip"),
    ({"train": [1]}, "recipe.yaml: train", "a mapping"),
    ({"train.steps": "many"}, "recipe.yaml: train.steps", "a whole number"),
    ({"train.steps": 0}, "recipe.yaml: train.steps", "at least 1"),
    ({"train.steps": -3}, "recipe.yaml: train.steps", "at least 1"),
    ({"train.steps": 2.5}, "recipe.yaml: train.steps", "a whole number"),
    ({"train.steps": True}, "recipe.yaml: train.steps", "a number"),
    ({"train.epochs": float("nan")}, "recipe.yaml: train.epochs", "finite"),
    ({"train.learning_rate": float("inf")}, "recipe.yaml: train.learning_rate", "finite"),
    ({"train.learning_rate": -1e-3}, "recipe.yaml: train.learning_rate", "more than 0"),
    ({"train.schedule": "cosin"}, "train.schedule", "`cosine`"),
    ({"train.precision": "fp99"}, "recipe.yaml: train.precision", "fp32"),
    ({"train.warmup": 3}, "train.warmup", "at most 2"),
    ({"train.device": "gpu"}, "train.device", "cpu"),
    ({"train.device": "cuda:99"}, "train.device", "cpu"),
    ({"train.device": "meta"}, "train.device", "cpu"),
    ({"train.best": "askd", "train.evaluate_every": 1}, "train.best", "`asked`"),
    ({"train.best": "asked"}, "train.best", "evaluate_every"),
    ({"train.patience": 2, "train.evaluate_every": 1}, "train.patience", "best: asked"),
    ({"train.evaluate_every": 1, "evaluate": {}}, "train.evaluate_every", "evaluate"),
    ({"evaluate": ["asked.jsonl"]}, "recipe.yaml: evaluate", "a mapping"),
    ({"evaluate.asked": "asked.jsonl"}, "recipe.yaml: evaluate.asked", "a mapping"),
    ({"evaluate.asked.rows": None}, "recipe.yaml: evaluate.asked.rows", "a file"),
    ({"evaluate.asked.rows": "none.jsonl"}, "none.jsonl", "check the path"),
    ({"evaluate.asked.role": "targt"}, "recipe.yaml: evaluate.asked.role", "`target`"),
    ({"evaluate.asked.metric": "containz"}, "evaluation set `asked`", "`contains`"),
    ({"evaluate.asked.metric": "choice"}, "asked.jsonl:1 (row ", "contains"),
    ({"evaluate.asked.max_new_tokens": 600}, "asked.jsonl:1 (row ", "max_new_tokens"),
    ({"name": "a/b"}, "recipe.yaml: name", "[A-Za-z0-9]"),
    ({"seed": -1}, "recipe.yaml: seed", "at least 0"),
    ({"trust_remote_code": "maybe"}, "recipe.yaml: trust_remote_code", "true or false"),
    ({"revision": "main"}, "revision", "leave the revision out"),
    ({"tune": "harf"}, "tune", "`half`"),
    ({"tune": "adamw"}, "tune", "`optimizer`"),
    ({"optimizer": ["clip", "half"]}, "optimizer[1]", "`tune`"),
    ({"tune": 3}, "tune", "selective"),
    ({"tune": []}, "tune", "lora"),
    ({"tune": {"half": {}, "lora": {}}}, "tune", "a list"),
    ({"tune": {"half": 3}}, "tune", "half: {option: value}"),
    ({"tune": {"half": {"shar": 0.5}}}, "tune: half", "`share`"),
    ({"tune": {"half": {"share": "x"}}}, "tune: half", "a number"),
    ({"tune": {"half": {"share": 2}}}, "half: share", "at most 1"),
    ({"tune": {"half": {"level": "categry"}}}, "tune: half", "`category`"),
    ({"tune": {"lora": {"rank": 0}}}, "lora: rank", "at least 1"),
    ({"tune": {"lora": {"rank": True}}}, "tune: lora", "a number"),
    ({"tune": {"lora": {"rank": 10**9}}}, "lora: rank", "at most"),
    ({"tune": {"lora": {"alpha": float("nan")}}}, "tune: lora", "finite"),
    ({"tune": {"lora": {"target_modules": ["lineer"]}}}, "target_modules", "`linear`"),
    ({"tune": {"lora": {"target_modules": "linear"}}}, "tune: lora", "a list"),
    ({"tune": ["full", "half"]}, "model.layers.0.self_attn.q_proj.weight", "different target_modules"),
    ({"optimizer": "clip"}, "optimizer", "adamw"),
    ({"optimizer": [{"adamw": {"beta1": 2}}]}, "adamw: beta1", "below 1"),
    ({"optimizer": [{"adamw": {"weight_decay": -1}}]}, "adamw: weight_decay", "0 or more"),
    ({"optimizer": [{"sgd": {"momentum": 5}}]}, "sgd: momentum", "below 1"),
    ({"gradient_estimator": ["backprop", "backprop"]}, "gradient_estimator", "name one"),
    ({"callbacks": "nothing_like_it"}, "callbacks", "known"),
    ({"model": "smollm2-135m-instrct"}, "model", "`smollm2-135m-instruct`"),
    ({"model": "tiny:lama"}, "tiny:", "`llama`"),
    ({"model": "tiny:bert"}, "objective", "causal"),
    ({"model": "none.gguf"}, "model", "GGUF"),
    ({"model": "m" * 5000}, "model", "a folder"),
    ({"model": "~nobody-of-this-name/model"}, "model", "a folder"),
    ({"out": "asked.jsonl"}, "out: asked.jsonl", "a folder that can be written to"),
    ({"out": "asked.jsonl/runs"}, "out: asked.jsonl/runs", "a folder that can be written to"),
]


def _called(case: Any) -> str:
    return str(case)[:60].replace("/", "-") if isinstance(case, dict) else ""


@pytest.mark.parametrize(("changes", "where", "fix"), RECIPES, ids=_called)
def test_a_bad_key_or_value(changes: dict[str, Any], where: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused_to_train(tmp_path, write_recipe(tmp_path, changes), [where], fix)


def test_two_techniques_for_one_number_are_both_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"tune": ["full", "half"]})
    error = refused(lambda: luthier.train(recipe), ["model.layers.0"], "target_modules")
    assert "`half`" in error.what and "`full`" in error.what


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    refused_to_train(tmp_path, write_recipe(tmp_path, {"train.device": "cuda"}), ["train.device"], "use auto")


GOOD = "model: tiny:llama\nrows: {train: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("content", "where", "fix"),
    [
        (b"", "recipe.yaml", "model:"),
        (b"- tiny:llama\n", "recipe.yaml", "model:"),
        (b"3\n", "recipe.yaml", "model:"),
        (b"model: caf\xe9\n", "recipe.yaml", "YAML file"),
        (b"model: \x00\n", "recipe.yaml", "quotes"),
        (b"model: tiny:llama\nrows: {train: [\n", "recipe.yaml:3", "quotes"),
        (b"model: tiny:llama\nrows:\n\ttrain: rows.jsonl\n", "recipe.yaml:3", "indentation"),
        (GOOD.encode() + b"model: tiny:gpt2\n", "recipe.yaml:3", "keys"),
        (GOOD.encode() + b"1: 2\n", "recipe.yaml:3", "keys"),
        (GOOD.encode() + b"evaluate: {on: {rows: asked.jsonl}}\n", "recipe.yaml:3", "quotes"),
        (GOOD.encode() + b"tune: !!python/object/apply:os.getcwd []\n", "recipe.yaml:3", "keys"),
        (b"model: tiny:llama\nrows: &rows {train: *rows}\n", "recipe.yaml:2", "keys"),
        (GOOD.encode() + b"control: 2026-99-99\n", "recipe.yaml", "date"),
        (GOOD.encode() + b"seed: " + b"9" * 5000, "recipe.yaml", "number"),
        (GOOD.encode() + b"tune: " + b"[" * 2000 + b"]" * 2000, "recipe.yaml", "nesting"),
    ],
    ids=lambda value: value[:40].decode("latin-1").replace("\0", "0") if isinstance(value, bytes) else "",
)
def test_a_bad_recipe_file(content: bytes, where: str, fix: str, tmp_path: Path) -> None:
    write_recipe(tmp_path, {}).write_bytes(content)
    refused_to_train(tmp_path, tmp_path / "recipe.yaml", [where], fix)


def test_no_recipe_file(tmp_path: Path) -> None:
    refused(lambda: read_recipe(tmp_path / "none.yaml"), ["none.yaml"], "YAML file")
    refused(lambda: read_recipe(tmp_path), [str(tmp_path)], "YAML file")


@pytest.mark.parametrize(
    ("word", "where", "fix"),
    [
        ("train.epochs", "command line", "train.epochs=2"),
        ("=3", "command line", "train.epochs=2"),
        ("train.=3", "command line", "train.epochs=2"),
        ("optimizer.clip.norm=3", "command line", "optimizer=..."),
        ("train.steps.x=3", "command line", "train.steps=..."),
        ("rows.train.x=3", "command line", "rows.train=..."),
        ("trian.steps=3", "recipe.yaml and the command line: trian", "`train`"),
        ("tune.lora.rnk=3", "tune: lora", "`rank`"),
        ("tune=[half", "tune", "`half`"),
        ("rows.train=2026-99-99", "2026-99-99", "check the path"),
    ],
)
def test_a_bad_override(word: str, where: str, fix: str, tmp_path: Path) -> None:
    refused_to_train(tmp_path, write_recipe(tmp_path, {"optimizer": ["clip", "adamw"]}), [where], fix, [word])


def _said(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD_LINE = json.dumps(ROWS[0]).encode() + b"\n"
# The name of the file of rows, what it holds, the words of the place, a word of the remedy.
FILES: list[tuple[str, Content, list[str], str]] = [
    ("rows.jsonl", b"", ["rows.jsonl"], "the right file"),
    ("rows.jsonl", b"\n  \n\n", ["rows.jsonl"], "the right file"),
    ("rows.jsonl", GOOD_LINE + b'\n{"prompt": oops}\n', ["rows.jsonl:3"], "fix this line"),
    ("rows.jsonl", GOOD_LINE + b'{"prompt": "a", "compl', ["rows.jsonl:2"], "fix this line"),
    ("rows.jsonl", GOOD_LINE + b'{"prompt": "\xff", "completion": "b"}\n', ["rows.jsonl:2"], "UTF-8"),
    ("rows.jsonl", GOOD_LINE + b"\0\0\0\n", ["rows.jsonl:2"], "fix this line"),
    ("rows.jsonl", GOOD_LINE + b"[1]\n", ["rows.jsonl:2"], "fix this row"),
    ("rows.jsonl", GOOD_LINE + b"3\n", ["rows.jsonl:2"], "fix this row"),
    ("rows.jsonl", GOOD_LINE + b"[" * 100_000, ["rows.jsonl:2"], "fix this line"),
    ("rows.jsonl", GOOD_LINE + b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", ["rows.jsonl:2"], "fix this line"),
    ("rows.jsonl", '{"text": "a"}\n'.encode("utf-16"), ["rows.jsonl"], "UTF-8"),
    ("rows.json", '[{"text": "a"}]'.encode("utf-16"), ["rows.json"], "UTF-8"),
    ("rows.jsonl", [{"text": "a", "id": "\ud800"}], ["rows.jsonl:1"], "the id"),
    ("rows.jsonl", [{**ROWS[0], "id": "x"}, {**ROWS[1], "id": "x"}], ["rows.jsonl:2"], "its own id"),
    ("rows.jsonl", [{**ROWS[0], "id": [1]}], ["rows.jsonl:1"], "the id"),
    ("rows.jsonl", [ROWS[0], {"prompt": "a"}], ["rows.jsonl:2", "(row "], "`completion`"),
    ("rows.jsonl", [{"promt": "a", "completion": "b"}], ["rows.jsonl:1"], "`prompt`"),
    ("rows.jsonl", [{"prompt": "a", "completion": ""}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{"prompt": 3, "completion": "b"}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{"prompt": "a", "completion": None}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{**ROWS[0], **_said(("user", "a"))}], ["rows.jsonl:1"], "say which one"),
    ("rows.jsonl", [{"text": "a", "label": float("nan")}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{"prompt": "a", "choices": ["x", "y"], "answer": 7}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}], ["rows.jsonl:1", "(row "], "dpo"),
    ("rows.jsonl", [_said(("usr", "a"), ("assistant", "b"))], ["rows.jsonl:1"], "`user`"),
    ("rows.jsonl", [_said((["user"], "a"), ("assistant", "b"))], ["rows.jsonl:1"], "`user`"),
    ("rows.jsonl", [{"messages": []}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{"messages": "hello"}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{"messages": ["hello"]}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{"messages": [{"role": "user"}]}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [_said(("user", "a"))], ["rows.jsonl:1", "(row "], "the assistant's answer"),
    ("rows.jsonl", [{"messages": [{"role": "assistant", "tool_calls": [3]}]}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{**_said(("user", "a"), ("assistant", "b")), "tools": 3}], ["rows.jsonl:1"], "fix this row"),
    ("rows.jsonl", [{"conversations": [{"from": "humn", "value": "x"}]}], ["rows.jsonl:1"], "`human`"),
    ("rows.jsonl", [{"prompt": "a" * 600, "completion": "b"}], ["rows.jsonl:1", "(row "], "too_long"),
    ("rows.docx", b"x", ["rows.docx"], ".jsonl"),
    ("folder/readme.rst", b"x", ["folder"], ".jsonl"),
    ("rows.parquet", b"PAR1xx", ["rows.parquet"], "damaged"),
    ("rows.jsonl.gz", b"xx", ["rows.jsonl.gz"], "damaged"),
    ("rows.jsonl.gz", gzip.compress(GOOD_LINE * 100)[:-20], ["rows.jsonl.gz"], "damaged"),
    ("rows.csv", "prompt,completion\na,b\na,b,c\n", ["rows.csv:3"], "fix this row"),
    ("rows.csv", "prompt,completion\na\n", ["rows.csv:2"], "fix this row"),
    ("rows.csv", "prompt,prompt\na,b\n", ["rows.csv:1"], "every column"),
    ("rows.csv", "prompt,completion\n", ["rows.csv"], "the right file"),
    ("rows.csv", 'prompt,completion\n"a,b\n', ["rows.csv"], "damaged"),
    ("rows.json", '{"a": 1}', ["rows.json"], ".jsonl"),
    ("rows.json", '[{"prompt":\n oops}]', ["rows.json:2"], "fix the file"),
    ("rows.json", "[3]", ["rows.json, item 1"], "fix this row"),
    ("rows.json", "[" * 100_000, ["rows.json"], "fix the file"),
    ("rows.txt", b"\xff\xfe", ["rows.txt"], "UTF-8"),
]


@pytest.mark.parametrize(("file", "content", "where", "fix"), FILES, ids=range(len(FILES)))
def test_a_bad_file_of_rows(file: str, content: Content, where: list[str], fix: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"rows.train": file.partition("/")[0]})
    put(tmp_path / file, content)
    refused_to_train(tmp_path, recipe, where, fix)


@pytest.mark.parametrize(
    ("changes", "where", "fix"),
    [
        ({"rows.train": "none.jsonl"}, ["none.jsonl"], "check the path"),
        ({"rows.train": "*.none"}, ["*.none"], "the pattern"),
        ({"rows.train": "n" * 5000}, ["nnn"], "check the path"),
        ({"rows.train": "~nobody-of-this-name/rows"}, ["~nobody"], "check the path"),
        ({"rows.train": ["own.jsonl", "same.jsonl"]}, ["own.jsonl:1", "same.jsonl:1"], "ids"),
        ({"rows.max_length": 8}, ["rows.jsonl:1 (row "], "raise max_length"),
        ({"rows.max_length": 3, "rows.too_long": "right"}, ["rows.jsonl:1 (row "], "fix these rows"),
        ({"rows.format": "messages"}, ["rows.jsonl:1"], "fix these rows"),
    ],
)
def test_rows_that_do_not_fit_the_recipe(changes: dict[str, Any], where: list[str], fix: str, tmp_path: Path) -> None:
    for number, name in enumerate(("own.jsonl", "same.jsonl")):
        put(tmp_path / name, [{**ROWS[number], "id": "x"}])
    refused_to_train(tmp_path, write_recipe(tmp_path, changes), where, fix)


@pytest.mark.parametrize(
    ("rows", "metric", "where", "fix"),
    [
        ([], None, ["asked.jsonl"], "the right file"),
        ([*ASKED, {"text": "a"}], None, ["`asked`", "asked.jsonl:5 (row "], "perplexity"),
        ([{"prompt": "a" * 600, "answer": "b"}], None, ["`asked`", "asked.jsonl:1 (row "], "shorten"),
        ([{"text": "a" * 600}], None, ["`asked`", "asked.jsonl:1 (row "], "shorten"),
        ([_said(("user", "a"))], "loss", ["`asked`", "asked.jsonl:1"], "the assistant's answer"),
    ],
)
def test_a_bad_evaluation_set(rows: list[Any], metric: str | None, where: list[str], fix: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"evaluate.asked.metric": metric})
    put(tmp_path / "asked.jsonl", lines(rows))
    refused_to_train(tmp_path, recipe, where, fix)
