"""Tokenizers that put a space before the beginning of a text, as those of Llama 2, Mistral and Phi-3 do."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from luthier.rows.encode import encode, encode_prompt
from luthier.rows.read import read

INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def space_first(template: str | None) -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [*map(chr, range(32, 127)), "\n", "\t", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(["[a](b) [c](d)", "the answer is yes", "no"] * 3, trainer)
    turn_tokens = [AddedToken(text, rstrip=True) for text in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>"), *turn_tokens])
    begin = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("template", [None, INSTRUCT, TURNS], ids=["plain", "instruct", "turns"])
def test_training_ids_begin_with_the_prompt_ids(template: str | None) -> None:
    """Fault 15: training ids are inference ids, and no space is lost or added where the answer begins."""
    tokenizer = space_first(template)
    rng = random.Random(1)
    for _ in range(60):
        question = "a" + "".join(rng.choice(["a", " ", "yes", "]", ".", "\n"]) for _ in range(rng.randrange(9)))
        answer = "".join(rng.choice(["(", "yes", " ", "\n", "a"]) for _ in range(rng.randrange(9))) + "a"
        (row,) = read([{"prompt": question, "completion": answer}])
        trained, prompt = encode(row, tokenizer), encode_prompt(row, tokenizer)
        assert trained.token_ids[: len(prompt)] == prompt
        assert trained.supervised.index(True) == len(prompt)
        if template is None:
            pieces = tokenizer.convert_ids_to_tokens(trained.token_ids)
            assert "".join(pieces).replace("▁", " ") == f"<s> {question}{answer}</s>"


def test_the_whole_text_decides_where_the_prompt_is_its_beginning() -> None:
    """Fault 15: behind a special token the space is the tokenizer's own, in training as in the template's own ids."""
    tokenizer = space_first(TURNS)
    (row,) = read([{"prompt": "the answer", "completion": "yes"}])
    messages = [{"role": "user", "content": "the answer"}, {"role": "assistant", "content": "yes"}]
    trained = encode(row, tokenizer)
    assert list(trained.token_ids) == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    learned = [token for token, target in zip(trained.token_ids, trained.supervised, strict=True) if target]
    assert "".join(tokenizer.convert_ids_to_tokens(learned)) == "▁yes<|end|>"


def test_no_space_is_put_where_a_text_is_cut() -> None:
    """Fault 15: a bracket that ends the prompt and one that begins the answer are one token together, and are cut."""
    tokenizer = space_first(None)
    assert "](" in tokenizer.get_vocab()
    (row,) = read([{"prompt": "[a]", "completion": "(b)"}])
    trained, prompt = encode(row, tokenizer), encode_prompt(row, tokenizer)
    assert trained.token_ids[: len(prompt)] == prompt and trained.supervised.index(True) == len(prompt)
    assert "".join(tokenizer.convert_ids_to_tokens(trained.token_ids[len(prompt) :])) == "(b)</s>"
