"""What is exported has the type that is asked for, its tokenizer and a card; the card's own lines load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.errors import LuthierError
from luthier.report.card import Use, model_card, plain
from luthier.results.folder import Run
from tests.unit.test_saving import ROWS, logits, trained

EVALUATE = {"asked <b>|": {"rows": ROWS[:2], "metric": "loss"}}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("runs"), "lora", evaluate=EVALUATE)


def _bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_model_is_written_in_the_type_asked_for(name: str, dtype: torch.dtype, lora: Run, tmp_path: Path) -> None:
    """A model trained in fp32 could be exported in fp32 alone, at twice the size it is served in."""
    before = _bits(lora.model)
    whole, told = lora.export(tmp_path / "fp32"), lora.export(tmp_path / name, dtype=name)
    exact, found = (AutoModelForCausalLM.from_pretrained(tmp_path / one, dtype="auto") for one in ("fp32", name))
    assert (whole["dtype"], told["dtype"]) == ("float32", str(dtype).removeprefix("torch."))
    assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == told["dtype"]
    for parameter, values in exact.named_parameters():
        assert torch.equal(found.get_parameter(parameter), values.to(dtype)), parameter
    assert told["merge_kl"] > 10 * whole["merge_kl"] and told["max_logit_difference"] < 1e-2
    assert all(torch.equal(values, before[key]) for key, values in lora.model.state_dict().items())


def test_a_classifier_and_vectors_are_written_in_it_too(tmp_path: Path) -> None:
    labels = [{"text": f"It is {i}.", "label": "even" if i % 2 == 0 else "odd"} for i in range(6)]
    near = [{"query": f"What is {i}?", "positive": f"It is {i}."} for i in range(6)]
    for objective, rows in (({"classify": {"labels": ["even", "odd"]}}, labels), ("embed", near)):
        run = trained(tmp_path / "runs", "lora", objective=objective, rows={"train": rows})
        name = objective if isinstance(objective, str) else "classify"
        told = run.export(tmp_path / name, dtype="bf16")
        assert told["dtype"] == "bfloat16"
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        card = (tmp_path / name / "README.md").read_text()
        assert ("AutoModelForSequenceClassification" if name == "classify" else "SentenceTransformer") in card


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--dtype", "f16"], "no dtype `f16`.*fp16"),
        (["--dtype", "int4"], "no dtype `int4`.*auto, fp32, bf16, fp16"),
        (["--quantize", "q8_0"], "GGUF.*--as gguf"),
        (["--as", "gguf", "--quantize", "q3"], "`q3` is no quantization.*q8_0"),
        (["--as", "gguf", "--quantize", "q8_0", "--dtype", "bf16"], "no dtype of its own"),
        (["--as", "onnx"], "no form of export"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: list[str], words: str, lora: Run, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(lora.folder), str(tmp_path / "out"), *asked, "--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == 2 and re.search(words, f"{told['error']} {told.get('fix')}", re.DOTALL), told
    assert not (tmp_path / "out").exists()


def test_an_adapter_comes_with_its_tokenizer_and_says_beside_what_it_was_trained(lora: Run, tmp_path: Path) -> None:
    """An adapter's folder held no tokenizer, and did not say that logits are the run's beside a base in fp32 alone."""
    told = lora.export(tmp_path / "adapter", form="peft", dtype="bf16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    turns = [{"role": "user", "content": "What is 3 and 3?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == lora.tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer("What is 3?")["input_ids"] == lora.tokenizer("What is 3?")["input_ids"]
    assert told["base_dtype"] == json.loads((tmp_path / "adapter" / "base.json").read_text())["dtype"] == "float32"
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "dtype=torch.float32" in card and "library_name: peft" in card and "on no hub" in card


@pytest.mark.parametrize("form", ["model", "peft"])
def test_the_lines_of_a_card_load_what_it_stands_beside(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    luthier.open_model("tiny:llama")[0].model.save_pretrained(base)
    luthier.open_model("tiny:llama")[1].save_pretrained(base)
    run = trained(tmp_path / "runs", "lora", model=str(base))
    run.export(tmp_path / "result", form=form)
    card = (tmp_path / "result" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[1].replace("the folder of the base", "base"), names)
    assert torch.allclose(logits(names["model"]), logits(run.model), atol=1e-4)
    assert names["tokenizer"]("What?")["input_ids"] == run.tokenizer("What?")["input_ids"]


def test_a_card_tells_what_was_measured_and_gives_away_neither_paths_nor_rows(lora: Run, tmp_path: Path) -> None:
    lora.export(tmp_path / "result")
    card = (tmp_path / "result" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["luthier", "lora"]}
    assert "| asked &lt;b&gt;\\| | target | loss | 2 |" in card and "rows: 2 rows given in Python" in card
    assert str(tmp_path) not in card and str(lora.folder.parent) not in card and "What is 1 and 1?" not in card
    assert "2 of 3 rows and" in card and lora.facts["model"]["fingerprint"] in card
    assert "of everything else nothing is known" in card


def test_a_card_of_little_says_so() -> None:
    use = Use("peft", "", 'load("BASE", "FOLDER")')
    facts = {
        "name": "a*b",
        "status": "failed",
        "warnings": ["was `cut`\nshort"],
        "model": {"name": "/home/me/base", "origin": "/home/me/base", "ancestors": [{"run": "/home/me/runs/first-1"}]},
        "recipe": {
            "model": "/home/me/base",
            "out": "/home/me/runs",
            "rows": {"train": ["C:\\mine\\a.jsonl", {"rows": "~/b.jsonl"}]},
        },
    }
    card = model_card(facts, use, base="owner/base", folder="here", note="Mind the base.")
    assert yaml.safe_load(card.split("---\n")[1]) == {"base_model": "owner/base", "library_name": "peft", "tags": ["luthier"]}
    assert "# a\\*b\n" in card and "Nothing was measured." in card and "Mind the base." in card
    assert 'load("owner/base", "here")' in card and "- was \\`cut\\` short" in card
    assert "| trained on from | first-1 |" in card and "a.jsonl" in card and "b.jsonl" in card
    assert "/home/me" not in card and "mine" not in card and "out:" not in card
    assert plain("a\x1b[1m|b") == "a�\\[1m\\|b"


def test_a_type_that_is_unknown_is_refused_in_python(lora: Run, tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="no dtype"):
        lora.export(tmp_path / "out", dtype="float8")
