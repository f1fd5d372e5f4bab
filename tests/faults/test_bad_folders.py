"""Bad model folders, bad run folders and bad words on the command line: each is refused with its place and its remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.delta import Delta
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.results.folder import read_run
from luthier.results.opened import open_model
from luthier.runs.chat import Chat
from luthier.runs.export import export
from luthier.runs.measure import evaluate
from luthier.runs.rows import look_at_rows
from tests.faults.bad_input import ROWS, put, refused, refused_to_train, write_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def configured(**facts: Any) -> Callable[[Path], None]:
    """Changes a model's configuration."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **facts}))

    return change


def written(name: str, content: bytes) -> Callable[[Path], None]:
    """Writes a file over."""
    return lambda folder: put(folder / name, content)


def without(*names: str) -> Callable[[Path], None]:
    """Removes files."""
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)] and None


def cut(folder: Path) -> None:
    """Half a file of weights, as after a broken download."""
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickled(folder: Path) -> None:
    """Weights in a form that runs code."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def indexed(content: str) -> Callable[[Path], None]:
    """An index of shards instead of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return change


MODELS: list[tuple[Callable[[Path], None], str, str]] = [
    (without("config.json"), "model", "save_pretrained"),
    (without("model.safetensors"), "model", "copy the model again"),
    (without("tokenizer*"), "model", "the tokenizer"),
    (pickled, "model", "convert it once"),
    (cut, "model", "complete"),
    (written("model.safetensors", b""), "model", "complete"),
    (written("config.json", b"{"), "config.json", "copy the model again"),
    (written("config.json", b"[]"), "config.json", "copy the model again"),
    (written("config.json", b"\xff\xfe"), "config.json", "copy the model again"),
    (written("tokenizer.json", b"{}"), "model", "complete"),
    (written("tokenizer.json", b"\xff"), "model", "complete"),
    (written("tokenizer_config.json", b"3"), "model", "complete"),
    (written("chat_template.jinja", b"{% for x %}"), "chat template", "the turns"),
    (configured(model_type="lama"), "config.json", "upgrade transformers"),
    (configured(model_type=["llama"]), "config.json", "copy the model again"),
    (configured(architectures=3), "config.json", "copy the model again"),
    (configured(hidden_size="wide"), "model", "complete"),
    (configured(hidden_size=64), "model", "architecture"),
    (configured(num_hidden_layers=4), "model", "missing weights would be random"),
    (configured(max_position_embeddings=-1), "max_position_embeddings", "at least 2"),
    (indexed('{"weight_map": 3}'), "model.safetensors.index.json", "copy the model again"),
    (indexed('{"weight_map": {"a": 3}}'), "model", "copy the model again"),
    (indexed('{"weight_map": {"a": "not-there.safetensors"}}'), "model", "copy the model again"),
]


@pytest.mark.parametrize(("break_it", "where", "fix"), MODELS, ids=range(len(MODELS)))
def test_a_bad_model_folder(break_it: Callable[[Path], None], where: str, fix: str, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    break_it(broken)
    recipe = write_recipe(tmp_path, {"model": str(broken)})
    refused(lambda: luthier.train(recipe), [where], fix)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("content", [b"", b"GGUF" + b"\0" * 50, b"GGUF\x03\0\0\0" + b"\xff" * 50], ids=range(3))
def test_a_bad_gguf_file(content: bytes, tmp_path: Path) -> None:
    put(tmp_path / "model.gguf", content)
    recipe = write_recipe(tmp_path, {"model": str(tmp_path / "model.gguf")})
    refused_to_train(tmp_path, recipe, ["model.gguf"], "complete")


def test_tools_need_a_chat_template(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "f"}]}
    recipe = write_recipe(tmp_path, {"model": str(bare)})
    put(tmp_path / "rows.jsonl", [row])
    refused(lambda: luthier.train(recipe), ["rows.jsonl:1 (row "], "chat_template")
    # Without tools the rows take the plain form, which the plan says.
    put(tmp_path / "rows.jsonl", [{"messages": row["messages"]}])
    plan = luthier.planning.plan.make_plan(luthier.read_recipe(recipe))
    assert any("no chat template" in warning for warning in plan.warnings())


def test_what_is_unusual_and_allowed(tmp_path: Path) -> None:
    """A last turn nobody answered is context that nothing follows; shapes may be mixed, since every row says its own."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    recipe = write_recipe(tmp_path, {"evaluate": {}})
    put(tmp_path / "rows.jsonl", [{"messages": turns}, {"messages": turns[:2]}, {"text": "a document"}, ROWS[0]])
    rows = luthier.planning.plan.make_plan(luthier.read_recipe(recipe)).rows
    assert len(rows.rows) == 4 and not rows.dropped
    assert sum(rows.rows[0].supervised) == sum(rows.rows[1].supervised) > 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA; its folder's folder holds the recipe."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return luthier.train(write_recipe(folder, {"tune": "lora"})).folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, in `runs` of the working folder."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, {"tune": "lora"})
    return Path(shutil.copytree(finished, tmp_path / "runs" / "copied"))


def stated(folder: Path, **facts: Any) -> Path:
    """A run whose facts were changed."""
    known = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**known, **facts}))
    return folder


def uses(run: Path) -> list[Callable[[], Any]]:
    """Everything that opens a run."""
    recipe = luthier.read_recipe("recipe.yaml")
    return [
        lambda: open_model(str(run)),
        lambda: Chat(str(run)),
        lambda: evaluate(str(run), recipe),
        lambda: export(str(run), Path("exported")),
        lambda: export(str(run), Path("exported"), form="peft"),
    ]


@pytest.mark.parametrize(
    ("break_it", "where", "fix"),
    [
        (lambda run: stated(run, status="running"), "copied", "--resume"),
        (lambda run: stated(run, status="failed"), "copied", "--resume"),
        (written("run.json", b"{"), "run.json", "again"),
        (written("run.json", b"[]"), "run.json", "again"),
        (written("run.json", b"\xff"), "run.json", "again"),
        (written("run.json", b'{"status": "finished"}'), "run.json", "again"),
        (lambda run: stated(run, recipe=3), "run.json: recipe", "again"),
        (lambda run: stated(run, metrics={"asked": {"before": "high"}}), "run.json: metrics.asked.before", "again"),
        (lambda run: stated(run, recipe={"model": "tiny:llama", "rows": {"train": "x"}, "tun": 1}), "run.json: tun", "`tune`"),
        (lambda run: stated(run, recipe={"model": "tiny:gpt2", "rows": {"train": "x"}, "tune": "lora"}), "Delta", "tiny:llama"),
        (without("delta.safetensors"), "delta.safetensors", "check the path"),
        (written("delta.safetensors", b"xx"), "delta.safetensors", "Delta.save"),
    ],
)
def test_a_run_without_a_result(break_it: Callable[[Path], Any], where: str, fix: str, copied: Path) -> None:
    break_it(copied)
    for use in uses(copied):
        refused(use, [where], fix)
    assert not Path("exported").exists()


def test_a_delta_for_another_base(copied: Path, finished: Path) -> None:
    delta = Delta.load(finished / "delta.safetensors")
    other = tiny("llama", seed=5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    refused(lambda: delta.apply(other), ["Delta"], "tiny:llama")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_an_adapter_is_no_model(copied: Path) -> None:
    export(str(copied), Path("adapter"), form="peft")
    refused(lambda: open_model("adapter"), ["adapter"], "name the model itself")
    tensors = load_file("adapter/adapter_model.safetensors")
    assert tensors, "the adapter is whole"


def test_resuming_what_cannot_be_resumed(copied: Path, tmp_path: Path) -> None:
    recipe = luthier.read_recipe("recipe.yaml")
    refused(lambda: luthier.train(recipe, resume=copied), ["copied"], "train.steps=MORE")
    stated(copied, status="stopped")
    other = luthier.read_recipe("recipe.yaml", ["seed=5"])
    refused(lambda: luthier.train(other, resume=copied), ["copied"], "set these keys back")
    refused(lambda: luthier.train(recipe, resume=tmp_path), [str(tmp_path)], "a folder that a run made")
    refused(lambda: luthier.train(recipe, resume="nothing-here"), ["runs"], "copied")
    (copied / "run.json").write_text("{}")
    refused(lambda: luthier.train(recipe, resume=copied), ["run.json"], "again")


def test_where_a_file_stands_no_run_is_begun(tmp_path: Path) -> None:
    put(tmp_path / "runs", "a file")
    recipe = write_recipe(tmp_path, {})
    refused(lambda: luthier.train(recipe), [f"out: {tmp_path / 'runs'}"], "can be written to")
    assert (tmp_path / "runs").read_text() == "a file"


def test_a_name_of_a_run_that_is_not_there(copied: Path, tmp_path: Path) -> None:
    refused(lambda: read_run("copid"), ["runs"], "`copied`")
    refused(lambda: read_run(tmp_path), [str(tmp_path)], "a folder that a run made")
    refused(lambda: read_run("c" * 5000), ["runs"], "copied")


@pytest.mark.parametrize(
    ("call", "where", "fix"),
    [
        (lambda: Chat("tiny:llama", max_new_tokens=0).ask("a"), "", "max_new_tokens from 1"),
        (lambda: Chat("tiny:llama", max_new_tokens=5000).ask("a"), "prompt", "max_new_tokens"),
        (lambda: Chat("tiny:llama", max_new_tokens=1).ask("a" * 600), "prompt", "shorten"),
        (lambda: Chat("tiny:llama", temperature=-1.0).ask("a"), "", "temperature from 0"),
        (lambda: Chat("tiny:llama").ask("\ud800"), "question", "UTF-8"),
        (lambda: Chat("tiny:llama").ask_base("a"), "runs", "luthier runs"),
        (lambda: Chat("tiny:bert").ask("a"), "", "causal"),
        (lambda: look_at_rows("none.jsonl", "tiny:llama"), "none.jsonl", "check the path"),
        (lambda: look_at_rows("rows.jsonl", "tiny:lama"), "tiny:", "`llama`"),
        (lambda: look_at_rows("rows.jsonl", "tiny:llama", loss_on="everyone"), "--loss-on", "assistant"),
        (lambda: look_at_rows("rows.jsonl", "tiny:llama", shape="mesages"), "format", "`messages`"),
        (lambda: export("none", Path("rows.jsonl")), "rows.jsonl", "name another"),
        (lambda: export("none", Path("new")), "runs", "luthier runs"),
        (lambda: evaluate("tiny:llama", luthier.read_recipe("recipe.yaml", ["evaluate={}"])), "evaluate", "rows: FILE"),
    ],
)
def test_a_bad_use(call: Callable[[], Any], where: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, {})
    refused(call, [where], fix)


@pytest.mark.parametrize(
    ("words", "where", "fix"),
    [
        ("train", "luthier train", "a recipe"),
        ("train none.yaml", "none.yaml", "YAML file"),
        ("train --resume runs/none", "runs", "copied"),
        ("plan recipe.yaml evaluate.asked.rows=none.jsonl", "none.jsonl", "check the path"),
        ("plan recipe.yaml evaluate.asked.max_new_tokens=600", "asked.jsonl:1 (row ", "max_new_tokens"),
        ("eval none recipe.yaml", "model", "a folder"),
        ("export copied exported --as onnx --folder runs", "--as", "peft"),
        ("export copied recipe.yaml/exported --folder runs", "recipe.yaml/exported", "a place to write to"),
        ("compare copied copid --folder runs", "runs", "`copied`"),
        ("compare copied copied --folder runs --page runs", "runs", "a file"),
        ("compare copied recipe.yaml --folder runs", "recipe.yaml", "a folder that a run made"),
        ("runs copid --folder runs", "runs", "`copied`"),
        ("chat none --prompt hello", "model", "tiny:llama"),
        ("rows look rows.docx --model tiny:llama", "rows.docx", "check the path"),
        ("techniques harf", "", "`half`"),
        ("techniques --kind selectiv", "", "`selective`"),
    ],
    ids=lambda word: str(word)[:40].replace("/", "-"),
)
def test_a_bad_command(words: str, where: str, fix: str, copied: Path) -> None:
    """Exit code 2 and one JSON document, or a message without a traceback."""
    result = CliRunner().invoke(app, [*words.split(), "--json"])
    assert result.exit_code == 2, result.output
    told = json.loads(result.stdout)
    assert told["error"] and where in told["where"] and fix in told["fix"] and told["fix"], told
    shown = CliRunner().invoke(app, words.split())
    assert shown.exit_code == 2 and "Traceback" not in shown.output
    assert [path.name for path in Path("runs").iterdir()] == ["copied"], "nothing was begun"


def test_weights_that_are_no_numbers(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    recipe = write_recipe(tmp_path, {"model": str(broken)})
    error = refused(lambda: luthier.train(recipe), [str(broken)], "copy the model again")
    assert "model.norm.weight" in error.what and not list(tmp_path.glob("runs/*"))
