"""Every shape becomes token ids on one path, with the targets it should have."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.chat import PLAIN, form_of
from luthier.rows.encode import (
    Encoded,
    encode,
    encode_all,
    encode_each,
    encode_pair,
    encode_prompt,
    end_of_turn_ids,
    two_tokens,
)
from luthier.rows.read import read
from luthier.rows.shapes import Row

END = "<|im_end|>"


def plain_tokenizer() -> Any:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def row_of(record: dict[str, Any]) -> Row:
    return read([record])[0]


def both(encoded: Encoded, tokenizer: Any) -> tuple[str, str]:
    """The context and the targets as text."""
    pairs = list(zip(encoded.token_ids, encoded.supervised, strict=True))
    context = tokenizer.decode([token for token, target in pairs if not target])
    return context, tokenizer.decode([token for token, target in pairs if target])


USER = {"role": "user", "content": "q"}
PLAIN_FORMS = [
    ({"prompt": "q ", "completion": "a"}, "q ", "a"),
    ({"prompt": [USER], "completion": [{"role": "assistant", "content": "a"}]}, "q\n\n", "a"),
    ({"instruction": "do", "input": "it", "output": "a"}, "do\n\nit\n\n", "a"),
    ({"instruction": "do", "output": "a"}, "do\n\n", "a"),
    ({"text": "t", "label": 1}, "t\n\n", "1"),
    ({"prompt": "q ", "answer": ["a", "b"]}, "q ", "a"),
    ({"prompt": "q ", "choices": ["a", "b"], "answer": 1}, "q ", "b"),
    ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "q\n\n", "a"),
]


@pytest.mark.parametrize(("record", "prompt", "answer"), PLAIN_FORMS)
def test_the_plain_form(record: dict[str, Any], prompt: str, answer: str) -> None:
    tokenizer = plain_tokenizer()
    encoded = encode(row_of(record), tokenizer)
    assert both(encoded, tokenizer) == (prompt, answer + END)
    assert encoded.notes == (PLAIN,)
    assert tokenizer.decode(encode_prompt(row_of(record), tokenizer)) == prompt


TEMPLATED_FORMS = [
    ({"prompt": "q", "completion": "a"}, "q", "a"),
    ({"instruction": "do", "input": "it", "output": "a"}, "do\n\nit", "a"),
    ({"instruction": "do", "input": " ", "output": "a"}, "do", "a"),
    ({"text": "t", "label": "good"}, "t", "good"),
    ({"question": "q", "answer": "a"}, "q", "a"),
    ({"prompt": "q", "choices": ["a", "b"], "answer": "b"}, "q", "b"),
]


@pytest.mark.parametrize(("record", "prompt", "answer"), TEMPLATED_FORMS)
def test_the_templated_form(record: dict[str, Any], prompt: str, answer: str) -> None:
    tokenizer: Any = tiny_tokenizer()
    asked = f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"
    encoded = encode(row_of(record), tokenizer)
    assert tokenizer.decode(encoded.token_ids) == f"{asked}{answer}{END}\n"
    assert both(encoded, tokenizer)[1] == answer + END
    assert tokenizer.decode(encode_prompt(row_of(record), tokenizer)) == asked


def test_targets_by_hand() -> None:
    tokenizer = plain_tokenizer()
    encoded = encode(row_of({"id": "r", "prompt": "ab", "completion": "c", "score": 0.5}), tokenizer)
    a, b, c, end = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "c", END))
    assert encoded == Encoded(
        id="r",
        token_ids=(a, b, c, end),
        supervised=(False, False, True, True),
        where="row 1",
        columns={"score": 0.5},
        truncated=0,
        text_shape="prompt+completion",
        notes=(PLAIN,),
    )


def test_earlier_assistant_turns_of_a_prompt_are_context() -> None:
    tokenizer: Any = tiny_tokenizer()
    prompt = [USER, {"role": "assistant", "content": "a"}, USER]
    record = {"prompt": prompt, "completion": "b"}
    assert both(encode(row_of(record), tokenizer), tokenizer)[1] == "b" + END
    messages = {"messages": [*prompt, {"role": "assistant", "content": "b"}]}
    assert both(encode(row_of(messages), tokenizer), tokenizer)[1] == f"a{END}b{END}"


def test_a_prompt_ends_before_the_last_answer() -> None:
    tokenizer: Any = tiny_tokenizer()
    answered = row_of({"messages": [USER, {"role": "assistant", "content": "a"}]})
    open_ended = row_of({"messages": [USER]})
    assert encode_prompt(answered, tokenizer) == encode_prompt(open_ended, tokenizer)
    with pytest.raises(LuthierError, match="nothing stands before the assistant turn"):
        encode_prompt(row_of({"messages": [{"role": "assistant", "content": "a"}]}), tokenizer)
    prompt = encode(row_of({"text": "abc"}), tokenizer, purpose="prompt")
    assert (tokenizer.decode(prompt.token_ids), any(prompt.supervised)) == ("abc", False)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), plain_tokenizer()], ids=["template", "plain"])
def test_pairs_take_the_same_path(tokenizer: Any) -> None:
    preference = row_of({"id": "r", "prompt": "q ", "chosen": "good", "rejected": "bad"})
    for side in ("chosen", "rejected"):
        completion = preference.fields[side]
        pair = encode_pair(preference, tokenizer, completion, id=f"r/{side}")
        alone = encode(row_of({"prompt": "q ", "completion": completion}), tokenizer)
        assert (pair.token_ids, pair.supervised, pair.id) == (alone.token_ids, alone.supervised, f"r/{side}")
        prompt = encode_prompt(preference, tokenizer)
        assert pair.token_ids[: len(prompt)] == prompt and pair.supervised.index(True) == len(prompt)
    messages = row_of({"messages": [USER, {"role": "assistant", "content": "a"}]})
    assert both(encode_pair(messages, tokenizer, "other"), tokenizer)[1] == "other" + END
    with pytest.raises(LuthierError, match="a document has no prompt"):
        encode_pair(row_of({"text": "t"}), tokenizer, "x")


def test_rows_without_one_answer_say_so() -> None:
    tokenizer: Any = tiny_tokenizer()
    with pytest.raises(LuthierError, match="no one answer to learn; it has `response`, `prompt`") as prompt_only:
        encode(row_of({"prompt": "q", "response": "a"}), tokenizer)
    assert prompt_only.value.fix == "add a `completion`"
    with pytest.raises(LuthierError, match="no assistant turn to learn"):
        encode(row_of({"messages": [USER]}), tokenizer)


def test_tools_need_a_template() -> None:
    record = {"messages": [USER, {"role": "assistant", "content": "a"}], "tools": [{"name": "add"}]}
    with pytest.raises(LuthierError, match="uses tools"):
        encode(row_of(record), plain_tokenizer())


def test_template_options_reach_the_template() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = "{{ mood | default('') }}" + tokenizer.chat_template
    encoded = encode(row_of({"prompt": "q", "completion": "a"}), tokenizer, template_options={"mood": "glad"})
    assert tokenizer.decode(encoded.token_ids).startswith("glad<|im_start|>")


def test_ends_of_turn() -> None:
    assert end_of_turn_ids(tiny_tokenizer()) == (tiny_tokenizer().eos_token_id,)
    tokenizer: Any = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn_ids(tokenizer) == tuple(tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"]))
    assert form_of(tokenizer).turn_ends_itself


def test_every_row_is_accounted_for() -> None:
    tokenizer = plain_tokenizer()
    records: list[dict[str, Any]] = [
        {"id": "ok", "text": "abc"},
        {"id": "open", "messages": [USER]},
        {"id": "long", "text": "x" * 50},
    ]
    rows = read(records)
    with pytest.raises(LuthierError, match="2 of 3 rows cannot be used"):
        encode_all(rows, tokenizer, max_length=10)
    found = encode_all(rows, tokenizer, max_length=10, on_bad_row="skip")
    assert [row.id for row in found.rows] == ["ok"]
    assert [bad.where for bad in found.dropped] == ["row 2 (row open)", "row 3 (row long)"]
    assert (found.tokens, found.supervised_tokens, found.truncated) == (4, 3, 0)
    cut = encode_all(rows[2:], tokenizer, max_length=10, too_long="right")
    assert (cut.tokens, cut.truncated, cut.rows[0].truncated) == (10, 1, 41)
    assert encode_each(rows[1:2], tokenizer)[1][0].reason == "the conversation has no assistant turn to learn"
    with pytest.raises(LuthierError, match="no assistant turn"):
        encode_all(rows[1:2], tokenizer, on_bad_row="skip")
    with pytest.raises(LuthierError, match="there are no rows"):
        encode_all([], tokenizer)


def test_limits_are_checked() -> None:
    row = row_of({"text": "abc"})
    with pytest.raises(LuthierError, match="max_length is 1"):
        encode(row, tiny_tokenizer(), max_length=1)
    with pytest.raises(LuthierError, match="too_long is 'cut'"):
        encode(row, tiny_tokenizer(), too_long="cut")  # type: ignore[arg-type]
    with pytest.raises(LuthierError, match="loss_on is 'answers'"):
        encode(row, tiny_tokenizer(), loss_on="answers")  # type: ignore[arg-type]
    with pytest.raises(LuthierError, match="purpose is 'test'"):
        encode(row, tiny_tokenizer(), purpose="test")  # type: ignore[arg-type]
    with pytest.raises(LuthierError, match="cannot be cut on the right"):
        encode_prompt(row, tiny_tokenizer(), max_length=2, too_long="right")
    assert len(encode_prompt(row, tiny_tokenizer(), max_length=2, too_long="left")) == 2


def test_a_row_apart_from_its_text() -> None:
    bare = Encoded("r", (0, 0), (False, True), "row 1", {"score": 2}, 0, "text")
    assert two_tokens("r", "row 1", {"score": 2}, "text", targets=1) == bare
    none = Encoded("r", (0, 0), (False, False), "row 1", {}, 0, "text")
    assert two_tokens("r", "row 1", {}, "text", targets=0, mates=2).group == (none, none, none)


def test_cut_on_the_left_without_a_first_token_of_its_own() -> None:
    tokenizer = plain_tokenizer()
    whole = encode(row_of({"prompt": "abcd", "completion": "xy"}), tokenizer)
    cut = encode(row_of({"prompt": "abcd", "completion": "xy"}), tokenizer, max_length=6, too_long="left")
    assert (cut.token_ids, cut.supervised, cut.truncated) == (whole.token_ids[1:], whole.supervised[1:], 1)
    assert encode_all(read([{"prompt": "abcd", "completion": "xy"}]), tokenizer, max_length=6, too_long="left").truncated == 1


def test_texts_that_heads_read_lose_nothing_where_they_fit() -> None:
    text = row_of({"text": "abc", "label": 1})
    read_whole = encode(text, tiny_tokenizer(), purpose="read")
    assert encode(text, tiny_tokenizer(), purpose="read", max_length=len(read_whole)) == read_whole
    assert (read_whole.truncated, any(read_whole.supervised)) == (0, False)
