"""Messages that say `learn: false`: read, never learned, and never seen by a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.cache import keep
from luthier.rows.chat import UNLEARNED, form_of
from luthier.rows.chunks import Encoding
from luthier.rows.encode import encode, encode_all, encode_pair, encode_prompt
from luthier.rows.look import look
from luthier.rows.read import read
from luthier.rows.sources import Streamed
from tests.faults.test_faults_templates import CHATML, CHATML_MARKED, FAMILIES, QWEN3, byte_level, conversation, encoded, learned
from tests.faults.test_faults_tool_turns import FAMILIES as TOOL_FAMILIES
from tests.faults.test_faults_tool_turns import record

STRICT = "{% for m in messages %}{% if 'learn' in m %}{{ raise_exception('seen') }}{% endif %}{% endfor %}"


def marked(record: dict[str, Any], *places: int) -> dict[str, Any]:
    """The same record, with these messages as context only."""
    messages = [{**one, "learn": False} if place in places else one for place, one in enumerate(record["messages"])]
    return {**record, "messages": messages}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_marked_turn_is_read_and_not_learned(family: str) -> None:
    template, begin, end = FAMILIES[family]
    tokenizer = byte_level(STRICT + template)
    plain = conversation("hi", "yes", "and?", "no")
    whole, part = encoded(plain, tokenizer), encoded(marked(plain, 1), tokenizer)
    assert part.token_ids == whole.token_ids and part.notes == ()
    assert learned(part, tokenizer) == [f"{begin}no{end}"]
    assert learned(encoded(marked(plain, 3), tokenizer), tokenizer) == [f"{begin}yes{end}"]


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_a_marked_call_is_context(family: str) -> None:
    template, _, answer = TOOL_FAMILIES[family]
    tokenizer = byte_level(STRICT + template)
    row = encoded(marked(record(), 1), tokenizer)
    assert learned(row, tokenizer) == [answer] and "add" in tokenizer.decode(row.token_ids)


def test_marks_of_the_template_and_of_the_row_go_together() -> None:
    tokenizer = byte_level(STRICT + CHATML_MARKED)
    assert learned(encoded(marked(conversation("a", "b", "c", "d"), 1), tokenizer), tokenizer) == ["d<|im_end|>"]


def test_every_shape_with_messages() -> None:
    tokenizer = byte_level(STRICT + CHATML)
    turns = [
        {"role": "assistant", "content": "bad", "learn": False},
        {"role": "user", "content": "no", "learn": False},
        {"role": "assistant", "content": "good", "learn": True},
    ]
    asked = [{"role": "user", "content": "q", "learn": False}]
    rows = [
        {"messages": [*asked, *turns]},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "bad", "learn": False},
                {"from": "human", "value": "no"},
                {"from": "gpt", "value": "good"},
            ]
        },
        {"prompt": asked, "completion": turns},
        {"prompt": "q", "completion": [{"role": "user", "content": "q"}, *turns]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [*asked, *turns]},
    ]
    for one in rows:
        assert learned(encoded(one, tokenizer), tokenizer) == ["good<|im_end|>"], one
    (pair,) = read([{"prompt": asked, "chosen": turns, "rejected": turns[:1]}])
    assert learned(encode_pair(pair, tokenizer, pair.fields["chosen"]), tokenizer) == ["good<|im_end|>"]
    assert not any(encode_pair(pair, tokenizer, pair.fields["rejected"]).supervised)
    (row,) = read([{"messages": [*asked, *turns]}])
    assert "bad" in tokenizer.decode(encode_prompt(row, tokenizer))


def test_the_last_turn_and_all_text() -> None:
    tokenizer = byte_level(STRICT + CHATML)
    plain = conversation("hi", "yes", "and?", "no", system="Be.")
    assert learned(encoded(marked(plain, 2), tokenizer, loss_on="last"), tokenizer) == ["no<|im_end|>"]
    last = encoded(marked(plain, 4), tokenizer, loss_on="last")
    assert not any(last.supervised) and last.notes == (UNLEARNED,)
    everything = learned(encoded(marked(plain, 2, 3), tokenizer, loss_on="all"), tokenizer)
    # The first token has nothing before it.
    assert everything == [
        "system\nBe.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n",
        "<|im_start|>assistant\nno<|im_end|>\n",
    ]
    assert not any(encoded(marked(plain, *range(5)), tokenizer, loss_on="all").supervised)
    ends = learned(encoded(marked(plain, 0, 4), tokenizer, loss_on="all"), tokenizer)
    assert ends == [
        tokenizer.decode(encoded(plain, tokenizer).token_ids).split("Be.<|im_end|>\n")[1].split("<|im_start|>assistant\nno")[0]
    ]


def test_all_text_is_refused_where_turns_cannot_be_told_apart() -> None:
    thinking = conversation("a", "<think>x</think>\n\nb", "c", "d")
    with pytest.raises(LuthierError, match="message by message"):
        encoded(marked(thinking, 1), byte_level(QWEN3), loss_on="all")


def test_a_row_without_a_target_is_dropped_with_its_reason() -> None:
    plain = conversation("a", "b")
    found = encode_all(read([plain, marked(plain, 1)]), tiny_tokenizer())
    assert len(found.rows) == 1 and found.notes == {UNLEARNED: 1}
    (dropped,) = found.dropped
    assert dropped.reason == f"no token is left to learn: {UNLEARNED}"
    with pytest.raises(LuthierError, match="learn: false"):
        encode_all(read([marked(plain, 1)]), tiny_tokenizer())


def test_streamed_rows_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(marked(conversation("a", f"b{i}", "c", "d"), 1)) + "\n" for i in range(3)))
    tokenizer = tiny_tokenizer()
    streamed = keep([Streamed("rows", path)], Encoding(form_of(tokenizer), "assistant", None, "refuse")).rows
    assert tuple(streamed.rows) == encode_all(read(path), tokenizer).rows
    assert [learned(row, tokenizer) for row in streamed.rows] == [["d<|im_end|>"]] * 3


def test_looking_at_rows_shows_the_truth() -> None:
    looked = look([marked(conversation("hi", "wrong", "and?", "right"), 1)], tiny_tokenizer())
    (sample,) = looked.samples
    assert [piece.text for piece in sample.pieces if piece.target] == ["right", "<|im_end|>"]
    assert any("wrong" in piece.text and not piece.target for piece in sample.pieces)
    assert looked.supervised_tokens == len("right") + 1
    dropped = look([marked(conversation("hi", "wrong"), 1), conversation("hi", "right")], tiny_tokenizer())
    assert len(dropped.dropped) == 1 and UNLEARNED in dropped.dropped[0].reason


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "assistant", "content": "a", "learn": 0}, "must be true or false, not a number"),
        ({"role": "assistant", "content": "a", "learn": "false"}, "must be true or false, not text"),
        ({"role": "user", "content": "a", "learn": True}, "is the turn of a user and says `learn: true`"),
    ],
)
def test_other_values_are_refused(message: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        read([{"messages": [message, {"role": "assistant", "content": "b"}]}])


def test_nothing_is_said_where_a_file_has_null() -> None:
    (row,) = read(
        [{"messages": [{"role": "user", "content": "a", "learn": None}, {"role": "assistant", "content": "b", "learn": None}]}]
    )
    assert learned(encode(row, tiny_tokenizer()), tiny_tokenizer()) == ["b<|im_end|>"]
