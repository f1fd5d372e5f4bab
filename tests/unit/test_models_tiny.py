"""Tiny random models and their tokenizer."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import LuthierError
from luthier.models.fingerprint import fingerprint
from luthier.models.parts import map_parts
from luthier.models.tiny import ARCHITECTURES, MAX_POSITIONS, SPECIAL_TOKENS, VOCABULARY, tiny, tiny_tokenizer

TEXTS = [
    "plain words",
    "  leading and  double spaces",
    "tabs\t\tand\n\nnew lines\r\n",
    "Ünïcödé 日本語 🙂 e\u0301",
    "\u00a0\u200b\u2028",
    "In 2024, x = 1,234.5",
    "<|im_start|> inside a text <|im_end|>",
    "",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models_are_small_random_and_repeatable(architecture: str) -> None:
    """Fault 28: the same seed gives the same weights, whatever the global random state, which stays as it was."""
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    model = tiny(architecture, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert fingerprint(tiny(architecture, seed=5)) == fingerprint(model)
    assert fingerprint(tiny(architecture, seed=6)) != fingerprint(model)
    assert model.num_parameters() < 200_000
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.unique().numel() > parameter.numel() * 0.9, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models_run_in_training_mode_without_dropout(architecture: str) -> None:
    model = tiny(architecture, dtype=torch.float64)
    token_ids_BT = torch.tensor([tiny_tokenizer().encode("abc def")])
    evaluated = model(token_ids_BT)[0]
    trained = model.train()(token_ids_BT)[0]
    assert evaluated.dtype == torch.float64
    assert torch.equal(evaluated, trained)


def test_the_options_change_the_model() -> None:
    model = tiny("qwen3", layers=4, width=64, vocabulary=300, tied=True)
    parts = map_parts(model)
    assert (parts.blocks, parts.width, parts.vocabulary) == (4, 64, 300)
    assert parts.ties == {"lm_head": "model.embed_tokens"}
    assert map_parts(tiny("qwen3", tied=False)).ties == {}


def test_float64_holds_the_same_numbers() -> None:
    pairs = zip(tiny("llama").parameters(), tiny("llama", dtype=torch.float64).parameters(), strict=True)
    assert all(torch.equal(single.double(), double) for single, double in pairs)


def test_what_can_not_be_built_is_refused() -> None:
    with pytest.raises(LuthierError, match="did you mean `llama`"):
        tiny("lama")
    with pytest.raises(LuthierError, match="multiple of 8"):
        tiny("llama", width=36)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = tiny_tokenizer()
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text


def test_a_token_is_a_byte_or_special() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCABULARY == 259
    assert len(tokenizer.encode("é🙂\n")) == 2 + 4 + 1
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, tokenizer.convert_tokens_to_ids("a"), 2]
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == list(SPECIAL_TOKENS)
    assert tokenizer.model_max_length == MAX_POSITIONS


def test_the_chat_template_is_plain_chatml() -> None:
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yo"}]
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\n"
    assert "generation %}" not in str(tokenizer.chat_template)
