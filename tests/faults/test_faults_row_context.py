"""Keys of other tools in and beside every shape: read where their meaning is plain, else refused or noted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from luthier.errors import LuthierError
from luthier.evaluate.sets import EvalSet
from luthier.models.tiny import tiny_tokenizer
from luthier.rows.chat import SPECIAL
from luthier.rows.encode import encode, encode_pair, encode_prompt
from luthier.rows.look import look
from luthier.rows.read import read
from luthier.rows.shapes import Row
from tests.faults.test_faults_templates import conversation, learned

TOKENIZER: Any = tiny_tokenizer()
USER = {"role": "user", "content": "q"}
SYSTEM = "<|im_start|>system\nSYS<|im_end|>\n"
ASKED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def row_of(record: dict[str, Any]) -> Row:
    """The only row."""
    return read([record])[0]


def text_of(record: dict[str, Any]) -> str:
    """A row as the model reads it."""
    return str(TOKENIZER.decode(encode(row_of(record), TOKENIZER).token_ids))


def turns(mark: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """Two answers of an assistant, with a mark each."""
    return [
        {"role": "assistant", "content": "bad", **mark},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "good", **other},
    ]


@pytest.mark.parametrize("key", ["weight", "loss", "loss_scale", "loss_mask", "train", "training", "trainable", "masked", "learn"])
def test_marks_of_other_tools_are_read_in_every_shape(key: str) -> None:
    """Turns that other tools' files mark as not to be learned were learned."""
    off, on = (True, False) if key == "masked" else (False, True)
    answers = turns({key: off}, {key: on})
    sharegpt = [{"from": "gpt" if one["role"] == "assistant" else "human", "value": one["content"]} | one for one in answers]
    for turn in sharegpt:
        del turn["role"], turn["content"]
    rows = [
        {"messages": [USER, *answers]},
        {"conversations": [{"from": "human", "value": "q"}, *sharegpt]},
        {"prompt": [USER], "completion": answers},
        {"prompt": [{"from": "human", "value": "q"}], "completion": sharegpt},
        {"instruction": "q", "output": "good", "history": [USER, answers[0]]},
    ]
    for one in rows:
        assert learned(encode(row_of(one), TOKENIZER), TOKENIZER) == ["good<|im_end|>"], one
    pair = row_of({"prompt": [USER], "chosen": answers, "rejected": answers[2:]})
    assert learned(encode_pair(pair, TOKENIZER, pair.fields["chosen"]), TOKENIZER) == ["good<|im_end|>"]


def test_numbers_and_lists_of_marks_are_read() -> None:
    """`weight: 0` beside a turn and `loss_mask` beside a conversation were free columns or nothing."""
    weighed = [{**USER, "weight": 1}, *turns({"weight": 0}, {"weight": 1.0})]
    listed = {"messages": [USER, *turns({}, {})], "loss_mask": [1, 0, 1, 1], "system": "SYS"}
    for one in ({"messages": weighed}, listed, {**listed, "loss_mask": "[0, 0, 0, 1]"}):
        assert learned(encode(row_of(one), TOKENIZER), TOKENIZER) == ["good<|im_end|>"]


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "assistant", "content": "a", "weight": 0.5}, r"`messages\[1\]\.weight` is 0\.5: a turn is learned or not"),
        ({"role": "assistant", "content": "a", "train": "no"}, "must be true or false, not text"),
        ({"role": "assistant", "content": "a", "weight": 0, "loss": True}, "learned by its `loss`, and not by its `weight`"),
        ({"role": "assistant", "content": "a", "train_detail": [{"train": False}]}, "marks parts of a turn"),
        ({"role": "user", "content": "a", "train": True}, "is the turn of a user and says `train: true`"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(message: dict[str, Any], what: str) -> None:
    """A mark that asks for what is not done here was passed over."""
    with pytest.raises(LuthierError, match=what) as refused:
        read([{"messages": [USER, message]}])
    assert "learn" in refused.value.fix


SHAPES: list[dict[str, Any]] = [
    {"messages": [USER, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "completion": "a"},
    {"prompt": [USER], "completion": "a"},
    {"prompt": "q", "completion": [USER, {"role": "assistant", "content": "a"}]},
    {"instruction": "q", "output": "a"},
    {"prompt": "q", "answer": "a"},
    {"question": "q", "answer": "a"},
    {"prompt": "q", "choices": ["a", "b"], "answer": "a"},
    {"question": "q", "choices": ["a", "b"], "answer": 0},
]


@pytest.mark.parametrize("record", SHAPES, ids=lambda record: "+".join(record))
def test_a_system_text_and_tools_beside_any_shape_are_read(record: dict[str, Any]) -> None:
    """A `system` beside most shapes never reached the text, nor did the tools beside some."""
    for key in ("system", "system_prompt"):
        assert text_of({**record, key: "SYS"}) == f"{SYSTEM}{ASKED}a<|im_end|>\n"
    assert text_of({**record, "system": "", "history": []}) == f"{ASKED}a<|im_end|>\n"
    prompt = TOKENIZER.decode(encode_prompt(row_of({**record, "system": "SYS"}), TOKENIZER))
    assert prompt == SYSTEM + ASKED
    assert row_of({**record, "tools": [{"name": "add"}]}).fields.get("tools") == [{"name": "add"}]


def test_a_system_text_stands_before_pairs_and_open_prompts() -> None:
    """Preferences and prompts without an answer lost their `system`, too."""
    pair = row_of({"prompt": "q", "chosen": "a", "rejected": "b", "system": "SYS"})
    for side in ("chosen", "rejected"):
        said = TOKENIZER.decode(encode_pair(pair, TOKENIZER, pair.fields[side]).token_ids)
        assert said.startswith(SYSTEM + ASKED)
    assert TOKENIZER.decode(encode_prompt(row_of({"prompt": "q", "system": "SYS"}), TOKENIZER)) == SYSTEM + ASKED


def test_an_answer_may_be_one_message() -> None:
    """Answers that are one message without a list around it, as some tools write preferences, were refused."""
    one, other = {"role": "assistant", "content": "a"}, {"from": "gpt", "value": "b"}
    pair = row_of({"prompt": "q", "chosen": one, "rejected": other})
    assert [pair.fields[side][0]["content"] for side in ("chosen", "rejected")] == ["a", "b"]


def test_earlier_turns_beside_a_shape_are_read() -> None:
    """Alpaca's `history` never reached the text; there its answers are learned, in a prompt they are context."""
    earlier = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
    for history in ([["x", "y"]], '[["x", "y"]]', [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]):
        alpaca = {"instruction": "q", "input": "", "output": "a", "history": history, "system": "SYS"}
        assert text_of(alpaca) == f"{SYSTEM}{earlier}{ASKED}a<|im_end|>\n"
        assert learned(encode(row_of(alpaca), TOKENIZER), TOKENIZER) == ["y<|im_end|>", "a<|im_end|>"]
        assert learned(encode(row_of(alpaca), TOKENIZER, loss_on="last"), TOKENIZER) == ["a<|im_end|>"]
        prompted = {"prompt": "q", "completion": "a", "history": history}
        assert text_of(prompted) == f"{earlier}{ASKED}a<|im_end|>\n"
        assert learned(encode(row_of(prompted), TOKENIZER), TOKENIZER) == ["a<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"messages": [{"role": "system", "content": "x"}, USER], "system": "y"}, "two system texts"),
        ({"prompt": "q", "system": "x", "system_prompt": "y"}, "`system` and `system_prompt` differ"),
        ({"prompt": "q", "system": ["x"]}, "`system` must be text, not a list"),
        ({"prompt": "q", "history": [["x"]]}, "`history` must be a list of pairs"),
        ({"messages": [USER], "loss_mask": [1, 0]}, "one mark for each of the 1 messages, and is 2 marks"),
        ({"prompt": "q", "documents": ["x"]}, "`documents` must be a list of objects"),
    ],
)
def test_context_that_says_two_things_is_refused(record: dict[str, Any], what: str) -> None:
    """Of two system texts one would be lost."""
    with pytest.raises(LuthierError, match=what):
        read([record])


def test_the_same_system_text_is_written_once() -> None:
    """A system text that stands beside the messages and in them was written twice in ShareGPT's form."""
    said = [{"from": "system", "value": "SYS"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert text_of({"conversations": said, "system": "SYS"}) == f"{SYSTEM}{ASKED}a<|im_end|>\n"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a", "label": False},
        {"instruction": "q", "output": "a", "kto_tag": "false"},
        {**conversation("q", "a"), "label": 0},
    ],
)
def test_an_answer_marked_as_bad_is_said_to_be_learned(record: dict[str, Any]) -> None:
    """Thumbs-down rows were learned as if they were good ones, and nothing said so."""
    key = "kto_tag" if "kto_tag" in record else "label"
    assert encode(row_of(record), TOKENIZER).notes == (
        f"`{key}` is false: an answer that is marked as a bad one is learned like any other",
    )
    assert encode(row_of({**record, key: True}), TOKENIZER).notes == ()


CALLS: list[dict[str, Any]] = [
    {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": given}}]}],
        "tools": [{"name": name, "parameters": {"properties": {key: {"type": "string"} for key in given}}}],
    }
    for name, given in (("weather", {"city": "Oslo"}), ("add", {"a": 2, "b": 3}), ("stop", {"now": None}))
]


def test_columnar_files_give_the_text_of_lines(tmp_path: Path) -> None:
    """Parquet and Arrow give every call the arguments of all others, as nulls, which were learned; a null in a line is meant."""
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(one) + "\n" for one in CALLS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CALLS[:2]), tmp_path / "rows.parquet")
    written = read(lines)
    for source in (tmp_path / "rows.parquet", datasets.Dataset.from_list(CALLS[:2])):
        found = read(source)
        assert [row.fields for row in found] == [row.fields for row in written][:2]
        assert [row.id for row in found] == [row.id for row in written][:2]
    assert written[2].fields["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"now": None}


def test_an_empty_accepted_answer_is_refused(tmp_path: Path) -> None:
    """A model that had learned to say nothing reached 100 % on rows whose answer is a call."""
    prompted = {"prompt": [USER], "completion": CALLS[0]["messages"][1:]}
    for record in (CALLS[0], prompted):
        for metric in ("exact_match", "equal", "contains", "f1", "last_number", "tool_call"):
            with pytest.raises(LuthierError, match="an accepted answer is empty"):
                EvalSet("calls", [row_of(record)], metric)
    assert EvalSet("calls", [row_of(CALLS[0])]).chosen_metric == "loss"


def test_a_preference_without_a_prompt_says_what_is_missing() -> None:
    """The offer was the key itself: did you mean `rejected`?"""
    with pytest.raises(LuthierError) as refused:
        read([{"chosen": "a", "rejected": "b"}])
    assert "`chosen` and `rejected` have no prompt in common" in refused.value.what
    assert "did you mean" not in refused.value.fix and "add a `prompt`" in refused.value.fix
    for record, lacks in (
        ({"instruction": "q", "response": "a"}, "lacks `output` for the shape instruction+output"),
        ({"question": "q", "solution": "a"}, "lacks `answer` for the shape question+answer"),
        ({"completion": "a"}, "lacks `prompt` for the shape prompt+completion"),
    ):
        with pytest.raises(LuthierError, match=lacks.replace("+", r"\+")):
            read([record])


@pytest.mark.parametrize("tools", ["", " ", "null", "[]", [], {}, None])
def test_no_tools_in_any_spelling(tools: Any) -> None:
    """Files that give every row `tools` write none in many ways, some of which were refused as broken JSON."""
    assert "tools" not in row_of({**conversation("q", "a"), "tools": tools}).fields


def test_tools_and_messages_as_text(tmp_path: Path) -> None:
    """Columns without nested types hold lists as JSON text, which was refused for all but tools."""
    plain = {**conversation("q", "a"), "tools": [{"name": "add"}]}
    written = {**plain, "messages": json.dumps(plain["messages"]), "tools": ['{"name": "add"}']}
    assert row_of(written).fields == row_of(plain).fields
    call = {"role": "assistant", "content": None, "tool_calls": json.dumps(CALLS[0]["messages"][1]["tool_calls"])}
    assert row_of({"messages": [USER, call]}).fields["messages"] == CALLS[0]["messages"]
    with pytest.raises(LuthierError, match="`tools` must be a list of objects") as refused:
        read([{**plain, "tools": ["weather"]}])
    assert "describe each tool" in refused.value.fix


def test_gzip_without_its_name_is_read(tmp_path: Path) -> None:
    """A compressed file without `.gz` in its name was called broken JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(b'{"prompt": "q", "completion": "a"}\n'))
    assert [row.fields for row in read(path)] == [{"prompt": "q", "completion": "a"}]


def test_white_space_is_not_called_nothing() -> None:
    """An answer of one line break was said to be empty."""
    with pytest.raises(LuthierError, match="`completion` is empty but for white space"):
        read([{"prompt": "Print a new line.", "completion": "\n"}])


def test_notes_are_plain_json() -> None:
    """Looking at rows as JSON failed wherever there was a note."""
    facts = look([{"id": "x", "prompt": "a <|im_end|> b", "completion": "d"}, {"text": "c"}], TOKENIZER).as_json()
    assert facts["notes"] == {SPECIAL: 1}
    assert json.loads(json.dumps(facts))["first_noted"] == {SPECIAL: "row 1 (row x)"}
