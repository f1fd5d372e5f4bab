"""GGUF files: read back equal to what their type rounds, in every architecture offered, and refused by name elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from luthier.cli import app
from luthier.errors import LuthierError
from luthier.export import export_gguf, gguf_tokenizer
from luthier.export.gguf import _check_weights, _neighbors
from luthier.export.model import PROBES, outputs
from luthier.kinds import Now
from luthier.methods.weight_delta.lora import lora
from luthier.models import load_model, load_tokenizer, map_parts, tiny
from luthier.models.tiny import CHAT_TEMPLATE
from luthier.runs.train import train
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.tolerance import TINY, assert_rounded

VOCABULARY = 320
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


CUTS = {
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": lambda: [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
    "qwen2": lambda: split(LLAMA3.replace("{1,3}", "")),
    "llama-bpe": lambda: split(LLAMA3),
}


def trained_tokenizer(cut: str = "gpt-2", **options: Any) -> Any:
    """A byte-level BPE with a few merges, of words and of digits, so that another cut gives other ids."""
    tokenizer = Tokenizer(models.BPE())
    steps = CUTS[cut]()
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(one, special=True, normalized=False) for one in specials],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PROBES, "0123456789 01 0123 the lazy dog ,, ''' \n\n\n"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|endoftext|>", **options},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model_of(architecture: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Qwen3's reader in `transformers` knows only heads of its default width, 128."""
    width = {"qwen3": 512}.get(architecture, 32)
    return tiny(architecture, dtype=dtype, vocabulary=VOCABULARY, width=width, **options)


def tuned(model: Any, technique: Any = None) -> Tune:
    tune = Tune(model, map_parts(model))
    tune.add("lora", technique or lora(rank=3), RunServices(tune, "lora", Now(seed=0)), {})
    rng = torch.Generator().manual_seed(3)
    tune.set({key: 0.1 * torch.randn(one.master.shape, generator=rng) for key, one in tune.trained.items()})
    return tune


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_file_answers_as_the_merged_model(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tune = tuned(model_of(architecture, dtype))
    base = [one.clone() for one in outputs(tune.model, [[5, 9, 200, 31, 77, 8]])]
    found = export_gguf(tune, trained_tokenizer(), tmp_path / "model.gguf")
    assert found["weights"] == {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    assert found["max_logit_difference"] == 0.0 and found["same_greedy_tokens"] == 1.0 and abs(found["kl"]) < 1e-12
    assert found["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert tune.merged is None and torch.equal(outputs(tune.model, [[5, 9, 200, 31, 77, 8]])[0], base[0])
    tune.merge()
    reloaded = load_model(str(tmp_path / "model.gguf"), dtype=dtype)
    again = outputs(reloaded, [[5, 9, 200, 31, 77, 8]])[0]
    assert torch.equal(again, outputs(tune.model, [[5, 9, 200, 31, 77, 8]])[0])
    assert float((again - outputs(model_of(architecture, dtype), [[5, 9, 200, 31, 77, 8]])[0]).abs().max()) > 0.1


@pytest.mark.parametrize("weights", ["f16", "bf16", "q8_0"])
def test_fewer_digits_cost_what_their_type_rounds(weights: str, tmp_path: Path) -> None:
    tune = tuned(model_of("llama"))
    found = export_gguf(tune, trained_tokenizer(), tmp_path / "model.gguf", weights=weights)
    assert found["weights"] == weights and 0.0 < found["max_logit_difference"] < 0.5 and 0.0 < found["kl"] < 1e-2
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == weights.upper()
    assert found["bytes"] < export_gguf(tune, trained_tokenizer(), tmp_path / "whole.gguf")["bytes"]


def test_rows_that_no_block_divides_become_float16(tmp_path: Path) -> None:
    export_gguf(tuned(tiny(width=40, vocabulary=VOCABULARY)), trained_tokenizer(), tmp_path / "model.gguf", weights="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.1.ffn_up.weight"] == "F16"


def test_a_rounding_bound_of_8_bits_that_can_fail() -> None:
    values = torch.linspace(-1, 1, 64).reshape(1, 64)
    rounded = torch.from_numpy(
        gguf.dequantize(gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    )
    _check_weights({"one": values}, {"one": rounded}, "q8_0")
    rounded[0, 3] += 1 / 127
    with pytest.raises(LuthierError, match="tensors differ"):
        _check_weights({"one": values}, {"one": rounded}, "q8_0")


def test_rotary_rows_change_places_by_hand() -> None:
    # Two heads of four rows: rows 0 and 2 of a head turn together, and become neighbors.
    rows = torch.arange(8.0)[:, None]
    assert _neighbors(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_written_once(tied: bool, tmp_path: Path) -> None:
    export_gguf(tuned(model_of("llama", tied=tied)), trained_tokenizer(), tmp_path / "model.gguf")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert ("output.weight" in names) is not tied and len(names) == len(set(names))
    assert load_model(str(tmp_path / "model.gguf")).config.tie_word_embeddings is tied


def test_a_head_with_a_change_of_its_own_is_written_apart(tmp_path: Path) -> None:
    tune = tuned(model_of("llama", tied=True), lora(rank=2, target_modules=("head",)))
    assert export_gguf(tune, trained_tokenizer(), tmp_path / "model.gguf")["max_logit_difference"] == 0.0
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert np.abs(tensors["output.weight"] - tensors["token_embd.weight"]).max() > 0.01


@pytest.mark.parametrize("cut", CUTS)
def test_text_is_cut_as_before(cut: str, tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(cut)
    export_gguf(tuned(model_of("qwen2")), tokenizer, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == cut
    again: Any = load_tokenizer(str(tmp_path / "model.gguf"))
    for text in (*PROBES, "01 0123 01234567 it's  \n\n x", "<|im_start|>user\nhi<|im_end|>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == CHAT_TEMPLATE


def test_a_tokenizer_without_the_token_that_readers_add_is_read_as_it_was(tmp_path: Path) -> None:
    """A run of a built-in model could not be exported: transformers gives GPT-2's kind a token `<|endoftext|>` that the file lacks."""
    tokenizer = load_tokenizer("workshop-small")
    tune = tuned(tiny(vocabulary=len(tokenizer)))
    assert export_gguf(tune, tokenizer, tmp_path / "model.gguf")["max_logit_difference"] == 0.0
    again = load_tokenizer(str(tmp_path / "model.gguf"))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("<|endoftext|>")["input_ids"] == tokenizer("<|endoftext|>")["input_ids"]


def test_the_file_states_what_a_reader_needs(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.add_tokens(["<think>"])
    model = model_of("llama")
    export_gguf(tuned(model), tokenizer, tmp_path / "small.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "small.gguf").fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "small" and fields["general.file_type"] == 0
    assert fields["llama.context_length"] == 512 and fields["llama.rope.freq_base"] == model.config.rope_parameters["rope_theta"]
    assert fields["llama.attention.head_count"] == 4 and fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.eos_token_id"] == 0
    # The chat template ends turns with a token of its own.
    assert fields["tokenizer.ggml.eot_token_id"] == 2 and fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False
    types = fields["tokenizer.ggml.token_type"]
    number = tokenizer.convert_tokens_to_ids("<think>")
    assert types[:3] == [gguf.TokenType.CONTROL] * 3 and types[3] == gguf.TokenType.NORMAL
    assert types[number] == gguf.TokenType.USER_DEFINED and types[number + 1 :] == [gguf.TokenType.UNUSED] * (
        VOCABULARY - number - 1
    )


def other_architecture(tune: Tune, tokenizer: Any) -> None:
    tune.model.config.model_type = "gemma"


def scaled_rotary(tune: Tune, tokenizer: Any) -> None:
    tune.model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def window(tune: Tune, tokenizer: Any) -> None:
    tune.model.config.sliding_window = 64


def other_cut(tune: Tune, tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def too_many_tokens(tune: Tune, tokenizer: Any) -> None:
    tokenizer.add_tokens([f"<{number}>" for number in range(30)])


def no_name(tune: Tune, tokenizer: Any) -> None:
    tune.model.get_submodule("model.layers.0").register_parameter("extra", torch.nn.Parameter(torch.ones(3)))


def other_rotation(tune: Tune, tokenizer: Any) -> None:
    """What GGUF has no word for: the live model turns at another speed than its configuration says."""
    tune.model.get_submodule("model.rotary_emb").inv_freq *= 1.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_architecture, "`gemma`"),
        (scaled_rotary, "`linear`"),
        (window, "window of 64"),
        (other_cut, "cuts text"),
        (too_many_tokens, "320 tokens"),
        (no_name, "model.layers.0.extra"),
        (other_rotation, "other outputs"),
    ],
)
def test_what_a_file_would_hold_wrongly_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    tune, tokenizer = tuned(model_of("llama")), trained_tokenizer()
    change(tune, tokenizer)
    with pytest.raises(LuthierError, match=said):
        export_gguf(tune, tokenizer, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == [] and tune.merged is None


def with_added(*tokens: AddedToken) -> Any:
    tokenizer = trained_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_that_take_more_than_their_text_are_refused(flag: str, special: bool, tmp_path: Path) -> None:
    """A file was written whose readers cut text around such a token otherwise, and the check looked elsewhere."""
    tokenizer = with_added(AddedToken("<harbor>", special=special, **{flag: True}))
    with pytest.raises(LuthierError) as told:
        export_gguf(tuned(model_of("llama")), tokenizer, tmp_path / "model.gguf")
    assert told.value.what.startswith(f"GGUF cannot hold that the added token `<harbor>` is {flag}")
    assert list(tmp_path.iterdir()) == []


def test_added_tokens_that_are_looked_for_in_another_text_are_refused(tmp_path: Path) -> None:
    """A file holds no normalizer, so that tokens which it finds were lost."""
    tokenizer = with_added(AddedToken("<harbor>", special=False, normalized=True))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(LuthierError, match="the added token `<harbor>` is normalized"):
        export_gguf(tuned(model_of("llama")), tokenizer, tmp_path / "model.gguf")


def test_every_added_token_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added tokens were in none of the texts on which a file's tokenizer was tried."""
    plain = with_added(AddedToken("<harbor>", special=True), AddedToken("<pier>", special=False, normalized=True))
    export_gguf(tuned(model_of("llama")), plain, tmp_path / "model.gguf")
    monkeypatch.setattr(gguf_tokenizer, "_check_added", lambda state, tokenizer: None, raising=False)
    for one in (AddedToken("<harbor>", lstrip=True), AddedToken("ar", special=False, single_word=True)):
        with pytest.raises(LuthierError, match="cuts text differently"):
            export_gguf(tuned(model_of("llama")), with_added(one), tmp_path / "other.gguf")


@pytest.mark.parametrize("name", [None, "chat"])
def test_a_file_keeps_all_chat_templates(name: str | None, tmp_path: Path) -> None:
    """Of a tokenizer with named templates a file kept one, or could not be written."""
    tokenizer = trained_tokenizer()
    others = {"chat": "C" + CHAT_TEMPLATE, "tool_use": "T" + CHAT_TEMPLATE}
    tokenizer.chat_template = others if name else {"default": CHAT_TEMPLATE, **others}
    if name is not None:
        from luthier.rows.template import choose

        choose(tokenizer, name)
    export_gguf(tuned(model_of("llama")), tokenizer, tmp_path / "model.gguf")
    found = load_tokenizer(str(tmp_path / "model.gguf")).chat_template
    assert found == {"default": others["chat"] if name else CHAT_TEMPLATE, **others}, "readers take the default"


def test_names_of_files_and_weights_are_checked(tmp_path: Path) -> None:
    tune, tokenizer = tuned(model_of("llama")), trained_tokenizer()
    with pytest.raises(LuthierError, match=r"\.gguf"):
        export_gguf(tune, tokenizer, tmp_path / "model")
    with pytest.raises(LuthierError, match="q8_0"):
        export_gguf(tune, tokenizer, tmp_path / "model.gguf", weights="q8")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(LuthierError, match="exists already"):
        export_gguf(tune, tokenizer, tmp_path / "model.gguf")
    wide = tuned(tiny(dtype=torch.float64, vocabulary=VOCABULARY))
    with pytest.raises(LuthierError, match="float64"):
        export_gguf(wide, tokenizer, tmp_path / "wide.gguf")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(LuthierError, match="no byte-level BPE"):
        export_gguf(tuned(model_of("llama")), tokenizer, tmp_path / "model.gguf")


def test_a_run_becomes_a_file_on_the_command_line(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "base")
    trained_tokenizer().save_pretrained(tmp_path / "base")
    run = train(
        {
            "model": str(tmp_path / "base"),
            "rows": {"train": [{"text": text} for text in PROBES]},
            "tune": "lora",
            "train": {"steps": 2, "batch_rows": 4, "device": "cpu", "precision": "fp32", "learning_rate": 0.01},
            "out": str(tmp_path / "runs"),
        }
    )
    target = tmp_path / "out" / "run.gguf"
    result = CliRunner().invoke(app, ["export", str(run.folder), str(target), "--as", "gguf", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["file"] == str(target) and json.loads(result.stdout)["weights"] == "f32"
    ids = [[5, 9, 200, 31, 77, 8]]
    found, base = outputs(load_model(str(target)), ids)[0], outputs(model_of("llama"), ids)[0]
    assert_rounded(found, outputs(run.model, ids)[0], TINY)
    assert float((found - base).abs().max()) > 1e-2
    for asked, weights in ((["--dtype", "fp16"], "f16"), (["--quantize", "q8_0"], "q8_0")):
        target = tmp_path / f"{weights}.gguf"
        told = CliRunner().invoke(app, ["export", str(run.folder), str(target), "--as", "gguf", *asked, "--json"])
        assert json.loads(told.stdout).get("weights") == weights, told.output
    refused = CliRunner().invoke(app, ["export", str(run.folder), str(tmp_path / "one"), "--quantize", "q8_0", "--json"])
    assert refused.exit_code == 2 and "GGUF" in json.loads(refused.stdout)["error"]
