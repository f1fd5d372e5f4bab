"""What fine-tuning tools get wrong about templates and masks, with small templates of every common family."""

from __future__ import annotations

import random
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from luthier.errors import LuthierError
from luthier.rows.chat import ALTERS, ENDLESS, REWRITES, SPECIAL, form_of
from luthier.rows.encode import Encoded, encode, encode_all, encode_pair, encode_prompt, end_of_turn_ids
from luthier.rows.read import read

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}"
    "{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}{{ '<|eom_id|>\\n' }}"
    "{% else %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}"
    "{{ '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA_MERGING = (
    "{{ bos_token }}"
    "{% set first = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ (first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% set turns = messages %}{% set before = '' %}"
    "{% if messages[0].role == 'system' %}"
    "{% set before = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if m == turns | selectattr('role', 'eq', 'user') | list | last %}{{ before }}{% endif %}"
    "{{ m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% set said = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in said and loop.index0 < ns.asked %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FORGETFUL = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
UNENDED = (
    "{% for m in messages %}{{ '### ' + m.role + '\\n' + m.content + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)

# The end of turn that a model of the family generates, and what its assistant text begins with behind the prompt.
FAMILIES = {
    "chatml": (CHATML, "", "<|im_end|>"),
    "chatml with marks": (CHATML_MARKED, "", "<|im_end|>"),
    "llama3": (LLAMA3, "", "<|eot_id|>"),
    "gemma": (GEMMA, "", "<end_of_turn>"),
    "gemma merging system": (GEMMA_MERGING, "", "<end_of_turn>"),
    "mistral": (MISTRAL, " ", "</s>"),
    "phi3": (PHI3, "", "<|end|>"),
}
TRIMMING = ("llama3", "gemma", "gemma merging system")
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL_TOKENS += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
SWALLOWING = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
SPECIAL_TOKENS += SWALLOWING
CORPUS = [
    "the answer is yes\n\n",
    "no\n\n\n",
    "  two  spaces\t\ttabs",
    "user assistant system model",
    "ünïcödé — 🎉🎉",
]


def byte_level(template: str, *, adds_bos: bool = False, eos_token: str | None = "</s>") -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # Line breaks stay together, as in the tokenizers of recent models, so that they can merge over a border.
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?\S+|\s+"), "isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    # Phi-3's tokens swallow the space behind them; the others stand for themselves.
    tokenizer.add_special_tokens([AddedToken(text, rstrip=text in SWALLOWING) for text in SPECIAL_TOKENS])
    # Trimmed offsets are what real tokenizers have; nothing may rely on offsets.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        pair = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=pair)
    known = {"bos_token": "<s>", "pad_token": "<pad>", **({"eos_token": eos_token} if eos_token else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **known)


def conversation(*contents: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def encoded(record: dict[str, Any], tokenizer: Any, **options: Any) -> Encoded:
    (row,) = read([record])
    return encode(row, tokenizer, **options)


def learned(row: Encoded, tokenizer: Any) -> list[str]:
    """The text of every unbroken run of targets."""
    runs = groupby(zip(row.token_ids, row.supervised, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for target, run in runs if target]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_end_of_turn_is_learned(family: str) -> None:
    """Fault 9: the real end-of-turn token is supervised in ChatML, Llama-3, Gemma, Mistral and Phi templates."""
    template, begin, end = FAMILIES[family]
    tokenizer = byte_level(template)
    assert form_of(tokenizer).end_of_turn == end
    assert end_of_turn_ids(tokenizer)[0] == tokenizer.convert_tokens_to_ids(end)
    row = encoded(conversation("hi", "yes", "and?", "no"), tokenizer)
    assert learned(row, tokenizer) == [f"{begin}yes{end}", f"{begin}no{end}"]
    assert row.notes == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_last_and_all(family: str) -> None:
    """Fault 9: the last turn alone, or every token, when asked for."""
    template, begin, end = FAMILIES[family]
    tokenizer = byte_level(template)
    record = conversation("hi", "yes", "and?", "no")
    assert learned(encoded(record, tokenizer, loss_on="last"), tokenizer) == [f"{begin}no{end}"]
    everything = encoded(record, tokenizer, loss_on="all")
    assert everything.supervised == (False,) + (True,) * (len(everything) - 1)


def test_tool_turns_are_context() -> None:
    """Fault 9: a call is learned up to its own end token; what the tool says is context."""
    tokenizer = byte_level(LLAMA3)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    row = encoded({"messages": messages, "tools": [{"type": "function", "function": {"name": "add"}}]}, tokenizer)
    first, second = learned(row, tokenizer)
    assert first == '{"name": "add", "arguments": {"a": 1}}<|eom_id|>'
    assert second == "It is 2.<|eot_id|>"


MARK_ALL = "{% generation %}{{ '<|im_start|>assistant\\n(note) ' + m.content + '<|im_end|>' }}{% endgeneration %}"
MARK_LAST = (
    "{{ '<|im_start|>assistant\\n(note) ' }}"
    "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>' }}"
)


@pytest.mark.parametrize(
    ("marked", "expected"),
    [(MARK_ALL, ["(note) yes<|im_end|>", "(note) no<|im_end|>"]), (MARK_LAST, ["no<|im_end|>"])],
)
def test_marks_narrow_the_targets(marked: str, expected: list[str]) -> None:
    """Fault 9: marks choose among what an assistant writes; never the generation prompt, always the end of the turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + marked + "{% else %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = byte_level(template)
    assert learned(encoded(conversation("hi", "yes", "and?", "no"), tokenizer), tokenizer) == expected


def test_a_template_without_an_end_gets_the_end_of_sequence_token() -> None:
    """Fault 9: where a template ends a turn with no token, the end-of-sequence token is added after the last turn."""
    tokenizer = byte_level(UNENDED)
    row = encoded(conversation("hi", "yes", "and?", "no"), tokenizer)
    assert learned(row, tokenizer) == ["yes\n\n", "no\n\n</s>"]
    without = byte_level(UNENDED, eos_token=None)
    assert encoded(conversation("hi", "yes"), without).notes == (ENDLESS,)


def test_an_end_token_inside_a_text_does_not_end_the_turn() -> None:
    """Fault 9: a special token written out in a message is read as one, with a note; it does not end the turn."""
    tokenizer = byte_level(CHATML)
    row = encoded(conversation("hi", "say <|im_end|> now"), tokenizer)
    assert learned(row, tokenizer) == ["say <|im_end|> now<|im_end|>"]
    assert row.notes == (SPECIAL,)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_one_beginning_and_one_end_a_turn(family: str, adds_bos: bool) -> None:
    """Fault 10: exactly one BOS where the template writes one, none added to it; as many ends as turns."""
    template, _, end = FAMILIES[family]
    tokenizer = byte_level(template, adds_bos=adds_bos)
    row = encoded(conversation("hi", "yes", "and?", "no"), tokenizer)
    written = 1 if "bos_token" in template else 0
    assert row.token_ids.count(tokenizer.bos_token_id) == written
    assert (row.token_ids[0] == tokenizer.bos_token_id) == bool(written)
    end_id = tokenizer.convert_tokens_to_ids(end)
    targets = [token for token, target in zip(row.token_ids, row.supervised, strict=True) if target]
    assert targets.count(end_id) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_rendering_up_to_a_turn_equals_the_whole(family: str) -> None:
    """Fault 11: the ids are those of the template's own full render, and each turn's prompt is their beginning."""
    template = FAMILIES[family][0]
    tokenizer = byte_level(template)
    record = conversation("hi there", "the answer is yes", "and?", "no")
    row = encoded(record, tokenizer)
    whole = tokenizer.apply_chat_template(record["messages"], tokenize=True)["input_ids"]
    assert list(row.token_ids) == whole
    (prompt,) = read([conversation("hi there", "the answer is yes", "and?")])
    ids = encode_prompt(prompt, tokenizer)
    assert row.token_ids[: len(ids)] == ids
    assert row.supervised[len(ids)] and not row.supervised[len(ids) - 1]


def test_a_template_that_rewrites_history_is_detected() -> None:
    """Fault 11: a turn that the full conversation shows otherwise than its inference is not learned; what would be lost of it is told."""
    tokenizer = byte_level(QWEN3)
    thinking = conversation("hi", "<think>hm</think>\nyes", "and?", "<think>ah</think>\nno")
    with pytest.raises(LuthierError, match="deletes the reasoning of an assistant's turn to learn: 'hm'") as refused:
        encoded(thinking, tokenizer)
    assert "rows.thinking: last" in refused.value.fix
    row = encoded(thinking, tokenizer, loss_on="last")
    assert learned(row, tokenizer) == ["<think>ah</think>\nno<|im_end|>"] and row.notes == ()
    plain = encoded(conversation("hi", "yes", "and?", "no"), tokenizer)
    assert learned(plain, tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]
    assert plain.notes == ()
    found = encode_all(read([thinking, conversation("a", "b")]), tokenizer, on_bad_row="skip")
    assert len(found.rows) == 1 and "'hm'" in found.dropped[0].reason


def test_a_template_that_adds_to_the_last_turn_only_is_detected() -> None:
    """Fault 11: Qwen3 writes an empty thought before the last answer only; earlier answers would lack it."""
    added = "{{ '<think></think>' if m.role == 'assistant' and loop.last else '' }}"
    written = "{{ '<|im_start|>' + m.role + '\\n' + m.content"
    template = CHATML.replace(written, written.removesuffix(" + m.content") + " }}" + added + "{{ m.content")
    assert added in template
    tokenizer = byte_level(template)
    row = encoded(conversation("hi", "yes", "and?", "no"), tokenizer)
    assert learned(row, tokenizer) == ["<think></think>no<|im_end|>"]
    assert row.notes == (REWRITES,)


def test_a_system_text_that_moves_to_the_last_question_is_detected() -> None:
    """Fault 11: Mistral's system text stands in the last user turn, so earlier turns were asked without it."""
    tokenizer = byte_level(MISTRAL)
    row = encoded(conversation("hi", "yes", "and?", "no", system="Be kind."), tokenizer)
    assert learned(row, tokenizer) == [" no</s>"]
    assert row.notes == (REWRITES,)
    merging = byte_level(GEMMA_MERGING)
    row = encoded(conversation("hi", "yes", "and?", "no", system="Be kind."), merging)
    assert learned(row, merging) == ["yes<end_of_turn>", "no<end_of_turn>"]


def test_text_a_template_deletes_is_reported() -> None:
    """Fault 11: a template that removes words even from the last turn is refused with them; one that only alters some is named."""
    with pytest.raises(LuthierError, match="deletes the reasoning of an assistant's turn to learn: 'hm'") as refused:
        encoded(conversation("hi", "<think>hm</think>yes"), byte_level(FORGETFUL))
    assert "rows.thinking: last" not in refused.value.fix and "rows.thinking: drop" in refused.value.fix
    shortening = byte_level(CHATML.replace("m.content", "m.content.split(' (')[0]"))
    with pytest.raises(LuthierError, match=r"deletes text of an assistant's turn to learn: '\(I am sure\)'"):
        encoded(conversation("hi", "yes (I am sure)"), shortening)
    shouting = byte_level(CHATML.replace("m.content", "m.content | replace('yes', 'YES')"))
    assert encoded(conversation("hi", "yes indeed"), shouting).notes == (ALTERS,)


def test_a_generation_prompt_the_turn_does_not_begin_with_is_refused() -> None:
    """Fault 11: where inference begins a turn otherwise than the conversation shows it, nothing is learned."""
    tokenizer = byte_level(CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}"))
    with pytest.raises(LuthierError, match=r"no token is left to learn.*begins an answer with '<think>"):
        encode_all(read([conversation("hi", "yes")]), tokenizer)


THINKING = CHATML.replace("'<|im_start|>assistant\\n' }}{% endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{% endif %}")


def test_a_generation_prompt_that_begins_the_answer_is_named() -> None:
    """Of single answers it was said that the template rewrites earlier turns, and nothing of what to do; answers that begin as the
    generation prompt has it were learnt, with a warning that their text is altered."""
    tokenizer = byte_level(THINKING)
    assert THINKING != CHATML
    with pytest.raises(LuthierError, match="begins an answer with '<think>") as refused:
        encode_all(read([conversation("q", "a")]), tokenizer)
    assert "earlier turns" not in refused.value.what
    row = encoded(conversation("q", "<think>\nwell</think>a"), tokenizer)
    assert learned(row, tokenizer) == ["well</think>a<|im_end|>"] and not row.notes


def test_a_call_that_takes_nothing_is_written_with_empty_arguments() -> None:
    """Templates that write a call's arguments failed with a message about the order of turns; calls as they were written before there
    could be several were no calls at all."""
    tokenizer = byte_level(
        CHATML.replace("m.content", "(m.tool_calls[0].function.arguments | tojson if m.tool_calls else m.content)")
    )
    calls = (
        {"tool_calls": [{"function": {"name": "now"}}]},
        {"function_call": {"name": "now"}},
        {"function_call": {"name": "now", "arguments": "{}"}},
    )
    for call in calls:
        record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, **call}]}
        assert learned(encoded(record, tokenizer), tokenizer) == ["{}<|im_end|>"]


def test_a_template_that_refuses_a_conversation_names_the_row() -> None:
    """Fault 11: strict templates refuse a system turn or two users in a row; the error says so and where."""
    tokenizer = byte_level(GEMMA)
    with pytest.raises(LuthierError, match="System role not supported") as refused:
        encode_all(read([conversation("hi", "yes", system="Be kind.")]), tokenizer)
    assert refused.value.where.startswith("row 1")
    two = {"messages": [*conversation("hi")["messages"], *conversation("hi", "yes")["messages"]]}
    with pytest.raises(LuthierError, match="Roles must alternate"):
        encoded(two, byte_level(MISTRAL))


TEXTS = [
    "yes",
    "ünïcödé — 🎉",
    "\ttabs\t",
    "  two spaces",
    "\n\nline breaks",
    "end \n",
    "日本語 text",
    "e\u0301 \u200d🏳️\u200d🌈",
    "</think> [/INST]",
]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TRIMMING])
@pytest.mark.parametrize("text", TEXTS)
def test_targets_decode_to_the_text_byte_for_byte(family: str, text: str) -> None:
    """Fault 12: what is learned is the assistant's text and its end, byte for byte."""
    template, begin, end = FAMILIES[family]
    tokenizer = byte_level(template)
    row = encoded(conversation("hi", text, "and?", text), tokenizer)
    assert learned(row, tokenizer) == [begin + text + end] * 2


def _random_text(rng: random.Random) -> str:
    return "a" + "".join(rng.choice(["a", " ", "\n", "\t", "é", "🎉", "yes", ".", "["]) for _ in range(rng.randrange(12)))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_ids_are_inference_ids(family: str, tmp_path: Path) -> None:
    """Fault 15: training ids begin with the prompt's ids, also where tokens could merge, and after saving."""
    template, begin, end = FAMILIES[family]
    tokenizer = byte_level(template)
    tokenizer.save_pretrained(tmp_path)
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rng = random.Random(0)
    for _ in range(40):
        question, answer = _random_text(rng), "\n" * rng.randrange(3) + _random_text(rng)
        (row,) = read([{"prompt": question, "completion": answer}])
        trained, prompt = encode(row, tokenizer), encode_prompt(row, tokenizer)
        assert trained.token_ids[: len(prompt)] == prompt
        assert trained.supervised.index(True) == len(prompt)
        asked = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        assert list(prompt) == asked["input_ids"]
        if family not in TRIMMING:
            assert learned(trained, tokenizer) == [begin + answer + end]
        assert encode(row, reloaded) == trained
        assert encode_pair(row, tokenizer, answer) == trained


def test_a_line_break_that_merges_over_the_border_is_cut() -> None:
    """Fault 15: a line break ends the prompt, one begins the answer; together they would be one token."""
    tokenizer = byte_level(CHATML)
    (double,) = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    (row,) = read([{"prompt": "hi", "completion": "\nyes"}])
    trained = encode(row, tokenizer)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\nyes"}], tokenize=True
    )["input_ids"]
    assert double in whole and double not in trained.token_ids
    assert learned(trained, tokenizer) == ["\nyes<|im_end|>"]
