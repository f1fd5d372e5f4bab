"""Tokens that a run adds: their rows begin where their text was, they alone train, and every form of the result holds them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.delta import Delta
from luthier.errors import LuthierError
from luthier.models.fingerprint import fingerprint
from luthier.models.load import load_model, load_tokenizer, resolve, source_reads
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe, read_recipe
from luthier.results.folder import read_run
from luthier.results.opened import open_base, open_run
from luthier.results.start import source_of
from luthier.runs.rows import look_at_rows
from tests.recipes.test_recipes import recipe
from tests.unit.test_export_gguf import trained_tokenizer

TOKENS = ["<think>", "</think>"]
ROWS = [{"prompt": f"What is {one} and {one}?", "completion": f"<think>{one} twice</think>{2 * one}"} for one in range(1, 9)]
NEW = {"model": {"name": "tiny:llama", "add_tokens": TOKENS}, "rows": {"train": ROWS}}
OLD = len(tiny_tokenizer())


def train(tmp_path: Path, **keys: Any) -> luthier.Run:
    return luthier.train(recipe(tmp_path, **{**NEW, **keys}))


def named(architecture: str) -> dict[str, Any]:
    return {"name": f"tiny:{architecture}", "add_tokens": TOKENS}


def matrices(model: Any) -> list[Tensor]:
    """Embedding and head, which are one where they are tied."""
    both = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return [one.detach() for one in ({id(one): one for one in both}).values()]


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits  # type: ignore[no-any-return]


# Tied and untied; a scaled embedding; a head with a bias.
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "phi"])
def test_rows_begin_at_the_mean_and_alone_move(architecture: str, tmp_path: Path) -> None:
    """A new row is the mean of the rows of its text; whatever decay and moments say, no other number moves, and the new ones do."""
    before: Any = load_model(f"tiny:{architecture}")
    run = train(tmp_path, model=named(architecture), optimizer={"adamw": {"weight_decay": 0.1}})
    assert {one.slot for one in run.tune.trained.values()} == {"new_tokens"} and run.facts["tune"] == "new_tokens"
    assert run.facts["model"]["added_tokens"] == {"<think>": OLD, "</think>": OLD + 1}
    start: Any = open_base(read_run(run.folder))[0].model
    pieces = tiny_tokenizer()("<think>")["input_ids"]
    assert len(pieces) == len("<think>")
    held = zip(matrices(before), matrices(start), matrices(run.model), strict=True)
    for was, begun, now in held:
        assert len(was) == OLD and len(begun) == len(now) == OLD + 2
        assert torch.equal(begun[:OLD], was) and torch.equal(now[:OLD], was)
        assert torch.allclose(begun[OLD], was[pieces].mean(dim=0))
        assert ((begun - now).abs().amax(dim=1) > 1e-5).tolist() == [False] * OLD + [True] * 2
    if architecture == "phi":
        bias, mine = before.lm_head.bias, start.lm_head.bias
        assert torch.allclose(mine[OLD], bias[pieces].mean()) and torch.equal(run.model.lm_head.bias[:OLD], bias)  # type: ignore[union-attr]
        assert not torch.equal(run.model.lm_head.bias, mine)  # type: ignore[union-attr]
    others = dict(run.model.named_parameters())
    for name, weight in before.named_parameters():
        if len(weight) != OLD:
            assert torch.equal(weight, others[name]), name


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_beside_lora_every_form_of_the_result_holds_them(architecture: str, tmp_path: Path) -> None:
    """Opened again, merged, beside the weights, and as a folder: the same answers, tokens read as one, rows for all of them."""
    run = train(tmp_path, model=named(architecture), tune="lora")
    assert {one.slot for one in run.tune.trained.values()} == {"lora", "new_tokens"}
    ids = run.tokenizer("<think>3</think>6")["input_ids"]
    assert ids[0] == OLD and ids[2] == OLD + 1 and len(ids) == 4
    said = logits(run.model, ids)
    for merged in (True, False):
        tune, tokenizer = open_run(run.folder, merged=merged)
        with torch.no_grad():
            again = tune.run(lambda: tune.model(torch.tensor([ids])).logits)  # noqa: B023
        assert tokenizer("<think>3</think>6")["input_ids"] == ids and torch.allclose(again, said, atol=1e-5)
    run.export(tmp_path / "written")
    written: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "written")
    assert tokenizer("<think>3</think>6")["input_ids"] == ids and torch.allclose(logits(written, ids), said, atol=1e-5)
    assert written.config.vocab_size == OLD + 2 == len(written.get_output_embeddings().weight)
    tied = architecture == "gemma"
    assert (written.get_output_embeddings().weight is written.get_input_embeddings().weight) is tied
    assert tokenizer.decode([OLD], skip_special_tokens=True) == "<think>"
    # As the base of another run, whose own rows come behind.
    two = train(tmp_path, model={"name": run.folder.name, "add_tokens": ["<tool>"]}, tune="lora", name="two")
    base, _ = open_base(read_run(two.folder))
    assert torch.allclose(logits(base.model, ids)[..., : OLD + 2], said, atol=1e-5)
    assert two.tokenizer("<think><tool>")["input_ids"] == [OLD, OLD + 2]
    again, _ = open_run(two.folder)
    assert torch.allclose(logits(again.model, [*ids, OLD + 2]), logits(two.model, [*ids, OLD + 2]), atol=1e-5)


def test_an_adapter_is_refused_by_name_and_a_gguf_file_holds_them(tmp_path: Path) -> None:
    run = train(tmp_path, tune="lora")
    with pytest.raises(LuthierError, match="rows for `<think>`, `</think>` which its base has not") as refused:
        run.export(tmp_path / "adapter", form="peft")
    assert "--as model" in refused.value.fix and not (tmp_path / "adapter").exists()
    tiny("llama", vocabulary=320).save_pretrained(tmp_path / "merges")
    trained_tokenizer().save_pretrained(tmp_path / "merges")
    run = train(tmp_path, model={"name": str(tmp_path / "merges"), "add_tokens": TOKENS}, tune="lora", name="merges")
    run.export(tmp_path / "model.gguf", form="gguf")
    source = resolve(str(tmp_path / "model.gguf"))
    ids = run.tokenizer("<think>3</think>6")["input_ids"]
    assert load_tokenizer(source)("<think>3</think>6")["input_ids"] == ids
    assert torch.allclose(logits(load_model(source), ids), logits(run.model, ids), atol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """With moments of the rows' own, and tokens by the recipe that the run keeps."""

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    keys = recipe(tmp_path, **NEW, tune="lora")
    stopped = luthier.train(keys, tell=interrupt)
    assert stopped.facts["status"] == "stopped"
    with pytest.raises(LuthierError, match="another recipe: add_tokens"):
        luthier.train({**keys, "model": "tiny:llama"}, resume=stopped.folder)
    again = luthier.train(
        read_recipe(stopped.folder / "recipe.yaml").model_copy(update={"rows": make_recipe(keys).rows}), resume=stopped.folder
    )
    assert again.facts["weights_sha256"] == luthier.train(keys).facts["weights_sha256"]


def test_commands_that_use_a_run(tmp_path: Path) -> None:
    """Measured, asked, compared and probed: the base that each sees has the rows."""
    sets = {"evaluate": {"sums": {"rows": [{"prompt": "What is 2 and 2?", "answer": "4"}]}}}
    run = train(tmp_path, tune="lora", **sets)
    assert run.metrics["sums"]["n"] == 1
    other = train(tmp_path, name="other", **sets)
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps(sets["evaluate"]["sums"]["rows"][0]))  # type: ignore[index]
    measured = {**recipe(tmp_path, **NEW), "rows": {"train": str(asked)}, "evaluate": {"sums": {"rows": str(asked)}}}
    (tmp_path / "measured.yaml").write_text(yaml.safe_dump(measured))
    folder = str(run.folder)
    for words in (
        ["eval", folder, str(tmp_path / "measured.yaml")],
        ["chat", folder, "--prompt", "What is 2 and 2? <think>", "--base"],
        ["compare", folder, str(other.folder)],
        ["probe", "intruder_dimensions", folder],
        ["probe", "intruder_dimensions", "tiny:llama", folder],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output


def test_the_delta_names_the_base_with_the_rows(tmp_path: Path) -> None:
    """A base without the rows is another base, and refused as one; what the delta holds are the rows alone."""
    run = train(tmp_path)
    delta = Delta.load(run.folder / "delta.safetensors")
    base, _ = open_base(read_run(run.folder))
    assert delta.base.fingerprint == fingerprint(base.model) == run.fact("model", "fingerprint")
    assert set(delta.changes) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert sum(form.index.numel() for forms in delta.changes.values() for form in forms) == 2 * 2 * base.parts.width  # type: ignore[attr-defined]
    delta.apply(base.model)
    assert torch.equal(matrices(base.model)[0], matrices(run.model)[0])
    with pytest.raises(LuthierError, match="belongs to tiny:llama with the tokens <think>, </think>"):
        delta.apply(load_model("tiny:llama"))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_pad_the_vocabulary_are_used_first(tied: bool, tmp_path: Path) -> None:
    """A model with more rows than tokens: one row is there, is set, trains, and one is added."""
    tiny("llama", vocabulary=OLD + 1, tied=tied).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    before: Any = load_model(str(tmp_path / "base"))
    read = recipe(tmp_path, **{**NEW, "model": {"name": str(tmp_path / "base"), "add_tokens": TOKENS}})
    lines = "\n".join(make_plan(make_recipe(read)).lines())
    assert "2 new: `<think>` (id 259), `</think>` (id 260)" in lines
    assert "1 rows are added, 1 of the rows that pad the matrices are used" in lines
    places = 1 if tied else 2
    assert f"{places * 2 * 32:,} parameters in these rows train: model.embed_tokens.weight" in lines
    run = luthier.train(read)
    start: Any = open_base(read_run(run.folder))[0].model
    pieces = tiny_tokenizer()("<think>")["input_ids"]
    for was, begun, now in zip(matrices(before), matrices(start), matrices(run.model), strict=True):
        assert len(was) == OLD + 1 and len(now) == OLD + 2
        assert torch.allclose(begun[OLD], was[pieces].mean(dim=0)) and not torch.allclose(begun[OLD], was[OLD])
        assert ((begun - now).abs().amax(dim=1) > 1e-5).tolist() == [False] * OLD + [True] * 2
    shutil.rmtree(run.folder)


def test_a_token_that_is_there_already_is_named(tmp_path: Path) -> None:
    for tokens in (["<think>", "<|im_end|>", "a"], ["a", "<|im_end|>"]):
        with pytest.raises(LuthierError) as refused:
            make_plan(make_recipe(recipe(tmp_path, **{**NEW, "model": {"name": "tiny:llama", "add_tokens": tokens}})))
        assert "`<|im_end|>` (id 2)" in refused.value.what and "`a` (id" in refused.value.what and "think" not in refused.value.what
    # Also one that the run added with which another begins.
    run = train(tmp_path)
    with pytest.raises(LuthierError, match=r"`<think>` \(id 259\) already"):
        make_plan(make_recipe(recipe(tmp_path, **{**NEW, "model": {"name": run.folder.name, "add_tokens": ["<think>"]}})))


def test_the_recipe_says_it_in_one_place(tmp_path: Path) -> None:
    one = make_recipe(recipe(tmp_path, **NEW))
    assert one.model == "tiny:llama" and one.add_tokens == ("<think>", "</think>") and one.tune == "none"
    (tmp_path / "kept.yaml").write_text(one.as_yaml())
    assert read_recipe(tmp_path / "kept.yaml").hash() == one.hash()
    # The whole model may be set on the command line without losing tokens, and tokens without losing the model.
    kept = read_recipe(tmp_path / "kept.yaml", ["model=tiny:qwen2", "tune=lora"])
    assert (kept.model, kept.add_tokens, kept.tune) == ("tiny:qwen2", one.add_tokens, "lora")
    assert read_recipe(tmp_path / "kept.yaml", ["model.add_tokens=[<x>]"]).add_tokens == ("<x>",)
    for wrong, said in (
        ({"name": "tiny:llama", "add_token": ["<x>"]}, "add_token"),
        ({"add_tokens": ["<x>"]}, "no name"),
        ({"name": "tiny:llama", "add_tokens": ["<x>", "<x>"]}, "`<x>` stands here twice"),
        ({"name": "tiny:llama", "add_tokens": [" "]}, "a list of texts"),
        ({"name": "tiny:llama", "revision": "main"}, "revision"),
    ):
        with pytest.raises(LuthierError, match=said):
            make_recipe(recipe(tmp_path, **{**NEW, "model": wrong}))


def test_full_trains_them_with_the_whole_matrices(tmp_path: Path) -> None:
    run = train(tmp_path, tune="full")
    assert {one.slot for one in run.tune.trained.values()} == {"full"}
    again, _ = open_run(run.folder)
    assert all(torch.equal(one, other) for one, other in zip(matrices(again.model), matrices(run.model), strict=True))
    part = train(tmp_path, name="part", tune={"half": {"embeddings": "freeze"}})
    assert "new_tokens" in {one.slot for one in part.tune.trained.values()}


def test_rows_are_read_and_written_with_them(tmp_path: Path) -> None:
    """What looks at rows, asks a run or goes on with it sees the tokens as the run does."""
    run = train(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x", "completion": "<think>y</think>z"}\n')
    seen = look_at_rows(str(rows), str(run.folder), out=str(tmp_path))
    assert not seen.skipped and "<think>" in [piece.text for one in seen.samples for piece in one.pieces]
    assert source_reads(source_of(str(run.folder), str(tmp_path))).vocabulary == OLD + 2


def test_beside_quantized_blocks(tmp_path: Path) -> None:
    """The rows are no part of what is held in few bits: they train beside it, and are there again."""
    run = train(tmp_path, tune="lora", quantize="int8")
    again, _ = open_run(run.folder)
    for now, then in zip(matrices(run.model), matrices(again.model), strict=True):
        assert torch.equal(now, then) and not torch.equal(now[OLD], now[:OLD].mean(dim=0))
    assert any(one.slot == "new_tokens" for one in run.tune.trained.values())


def test_the_whole_key_is_set_anew_on_the_command_line(tmp_path: Path) -> None:
    """A mapping on the command line met the tokens of the file, and was refused for standing in two places."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: workshop-small, add_tokens: [<a>]}\nrows: {train: rows.jsonl}\n")
    other = luthier.read_recipe(path, ["model={name: tiny:llama, add_tokens: [<b>]}"])
    assert (other.model, other.add_tokens) == ("tiny:llama", ("<b>",))
    assert luthier.read_recipe(path, ["model={name: tiny:llama}"]).add_tokens == ()
