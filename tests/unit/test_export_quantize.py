"""Files in few bits by llama.cpp's quantizer: what it is given, what is read back, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.export import export_gguf
from luthier.export import gguf as written
from luthier.export.gguf import QUESTIONS, _beside
from luthier.export.gguf_quantize import BITS, rounds_to
from luthier.export.model import outputs
from luthier.export.ollama import export_ollama
from luthier.models import load_model
from luthier.results.written import QUANTIZED
from tests.stub_llama_cpp import Stub
from tests.unit.test_export_gguf import model_of, trained_tokenizer, tuned


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    found = Stub()
    monkeypatch.setitem(sys.modules, "llama_cpp", found)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("name", "number", "kind"), [("q4_k_m", 15, "Q4_1"), ("q5_1", 9, "Q5_1"), ("q4_0", 2, "Q4_0")])
def test_the_quantizer_gets_the_whole_model_and_its_file_is_the_model(
    name: str, number: int, kind: str, stub: Stub, tmp_path: Path
) -> None:
    tune = tuned(model_of("llama"))
    whole = export_gguf(tune, trained_tokenizer(), tmp_path / "whole.gguf")
    found = export_gguf(tune, trained_tokenizer(), tmp_path / "small.gguf", weights=name)
    assert stub.calls == [{"ftype": number, "nthread": torch.get_num_threads(), "kinds": {"F32"}}] and stub.heard is None
    assert (
        found["weights"] == name
        and found["bytes"] < whole["bytes"]
        and sorted(one.name for one in tmp_path.iterdir())
        == [
            "small.gguf",
            "whole.gguf",
        ]
    )
    assert whole["kl"] < 1e-9 < found["kl"] < 1.0 and whole["same_greedy_tokens"] == 1.0
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    assert {one.tensor_type.name for one in reader.tensors} == {kind, "F32"}
    assert tune.merged is None
    ids = [[5, 9, 200, 31, 77, 8]]
    tune.merge()
    exact, read = outputs(tune.model, ids)[0], outputs(load_model(str(tmp_path / "small.gguf")), ids)[0]
    assert 0 < float((exact - read).abs().max()) <= 2 * found["max_logit_difference"]


def test_more_bits_agree_more(stub: Stub, tmp_path: Path) -> None:
    tune = tuned(model_of("llama"))
    four, five = (export_gguf(tune, trained_tokenizer(), tmp_path / f"{name}.gguf", weights=name) for name in ("q4_0", "q5_1"))
    assert five["kl"] < four["kl"] / 2 and four["same_greedy_tokens"] < five["same_greedy_tokens"] < 1.0


def flipped(name: str, values: np.ndarray) -> np.ndarray:
    return -values if name == "blk.1.ffn_up.weight" else values


def unturned(name: str, values: np.ndarray) -> np.ndarray:
    """Rotary rows in another order."""
    return np.roll(values, 1, axis=0) if name == "blk.0.attn_k.weight" else values


@pytest.mark.parametrize("spoil", [flipped, unturned])
def test_other_weights_than_the_models_are_refused(spoil: Any, stub: Stub, tmp_path: Path) -> None:
    stub.spoil = spoil
    with pytest.raises(LuthierError, match="1 of 21 tensors differ"):
        export_gguf(tuned(model_of("llama", tied=False)), trained_tokenizer(), tmp_path / "small.gguf", weights="q4_k_m")
    assert list(tmp_path.iterdir()) == []


def test_a_quantizer_that_refuses_is_heard(stub: Stub, tmp_path: Path) -> None:
    stub.code = 1
    with pytest.raises(LuthierError, match="a tensor has no columns"):
        export_gguf(tuned(model_of("llama")), trained_tokenizer(), tmp_path / "small.gguf", weights="q4_k_m")
    assert list(tmp_path.iterdir()) == [] and stub.heard is None


def test_what_few_bits_may_cost_a_weight() -> None:
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    off = values + 0.2 * values.square().mean().sqrt() * torch.sign(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    assert rounds_to(values, off, "q4_k_m") and not rounds_to(values, off, "q5_k_m") and rounds_to(values, off, "q2_k")
    for name in BITS:
        assert not rounds_to(values, values.roll(1, 0), name) and not rounds_to(values, values[:-1], name)
        assert not rounds_to(values, values * float("nan"), name) and not rounds_to(values, torch.zeros_like(values), name)


def test_tokens_of_answers_are_compared_place_by_place() -> None:
    """By hand: an answer that ends has an end, which is a token, too."""
    assert list(_beside([1, 2], [1, 3, 4])) == [(1, 1), (2, 3), (None, 4), (None, None)]
    assert list(_beside([], [])) == [(None, None)]
    assert len(list(_beside(range(8), range(3)))) == 8
    assert len(QUESTIONS) == len(set(QUESTIONS)) == 20


def test_a_model_that_reads_too_little_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "context_of", lambda tune: 20)
    assert export_gguf(tuned(model_of("llama")), trained_tokenizer(), tmp_path / "m.gguf")["same_greedy_tokens"] is None


def test_without_the_library_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    asked = ["export", "no-such-run", str(tmp_path / "out.gguf"), "--as", "gguf", "--json", "--quantize"]
    told = json.loads(CliRunner().invoke(app, [*asked, "q4_k_m"]).stdout)
    assert "cannot be loaded" in told["error"] and "llama-cpp-python" in told["fix"] and "q8_0" in told["fix"]
    told = json.loads(CliRunner().invoke(app, [*asked, "iq2_xs"]).stdout)
    assert "`iq2_xs` is no quantization" in told["error"] and all(name in told["fix"] for name in QUANTIZED)
    with pytest.raises(LuthierError, match="cannot be loaded"):
        export_gguf(tuned(model_of("llama")), trained_tokenizer(), tmp_path / "out.gguf", weights="q6_k")


def test_a_folder_for_ollama_holds_few_bits(stub: Stub, tmp_path: Path) -> None:
    told = export_ollama(tuned(model_of("llama")), trained_tokenizer(), tmp_path / "out", weights="q4_k_m")
    assert told["weights"] == "q4_k_m" and sorted(one.name for one in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
