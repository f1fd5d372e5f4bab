"""Shapes are known by their keys, and whatever cannot be used is named."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.rows.shapes import BadRow, Row, bad_rows_error, canonical_shapes, known_shapes, row_of, text_keys, unread

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def made(record: dict[str, Any], shape: str | None = None) -> Row:
    return row_of(record, id="1", where="file.jsonl:7", shape=shape)


SHAPES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"messages": [USER, ASSISTANT]}, "messages", {"messages": [USER, ASSISTANT]}),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        "messages",
        {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]},
    ),
    ({"prompt": "q", "completion": "a"}, "prompt+completion", {"prompt": "q", "completion": "a"}),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt+completion", {"prompt": [USER], "completion": [ASSISTANT]}),
    ({"instruction": "i", "output": "o"}, "instruction", {"instruction": "i", "input": "", "output": "o"}),
    (
        {"instruction": "i", "input": None, "output": "o"},
        "instruction",
        {"instruction": "i", "input": "", "output": "o"},
    ),
    ({"text": "t"}, "text", {"text": "t"}),
    ({"text": "t", "label": "x"}, "text+label", {"text": "t", "label": "x"}),
    ({"text": "t", "label": ["x", 2]}, "text+label", {"text": "t", "label": ["x", 2]}),
    ({"tokens": ["t", "u"], "tags": ["O", "B-x"]}, "text+tags", {"text": "t u", "words": [(0, 1), (2, 3)], "tags": ["O", "B-x"]}),
    (
        {"text": "t, u", "spans": [{"start": 0, "stop": 2, "label": "x"}]},
        "text+tags",
        {"text": "t, u", "words": [(0, 1), (1, 2), (3, 4)], "tags": ["B-x", "I-x", "O"]},
    ),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "prompt+chosen+rejected",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ),
    (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "b"}]},
        "prompt+chosen+rejected",
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "b"}]},
    ),
    (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "prompt+chosen+rejected",
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "b"}]},
    ),
    (
        {"prompt": "q", "answers": ["a", [USER, ASSISTANT]], "scores": "[2, 0.5]", "system": "s"},
        "prompt+answers+scores",
        {"prompt": [{"role": "system", "content": "s"}, USER], "answers": ["a", [ASSISTANT]], "scores": [2.0, 0.5]},
    ),
    (
        {"members": [{"text": "t"}, {"text": "u"}]},
        "members",
        {
            "members": [
                Row(f"1/{i}", "text", {"text": text}, f"file.jsonl:7: members[{i}]", derived=True) for i, text in enumerate("tu")
            ]
        },
    ),
    ({"prompt": "q", "answer": "a"}, "prompt+answer", {"prompt": "q", "answer": ["a"]}),
    ({"question": "q", "answer": ["a", "b"]}, "prompt+answer", {"prompt": "q", "answer": ["a", "b"]}),
    ({"prompt": "q", "answer": 42}, "prompt+answer", {"prompt": "q", "answer": ["42"]}),
    (
        {"prompt": "q", "choices": ["x", "y"], "answer": "y"},
        "prompt+choices+answer",
        {"prompt": "q", "choices": ["x", "y"], "answer": 1},
    ),
    (
        {"question": "q", "choices": ["x", "y"], "answer": 0},
        "prompt+choices+answer",
        {"prompt": "q", "choices": ["x", "y"], "answer": 0},
    ),
    ({"prompt": "q"}, "prompt", {"prompt": "q"}),
]


@pytest.mark.parametrize(("record", "shape", "fields"), SHAPES)
def test_every_shape_is_recognized_by_its_keys(record: dict[str, Any], shape: str, fields: dict[str, Any]) -> None:
    row = made(record)
    assert (row.shape, row.fields, row.id, row.where) == (shape, fields, "1", "file.jsonl:7")


def test_every_known_shape_is_tested() -> None:
    assert {shape for _, shape, _ in SHAPES} == set(canonical_shapes())
    assert all(set(name.split("+")) & text_keys() for name in known_shapes())


def test_nothing_is_dropped() -> None:
    row = made({"text": "t", "score": 0.5, "good": True, "source": "web", "meta": {"a": 1}, "none": None, "id": "x"})
    assert row.columns == {"score": 0.5, "good": 1, "source": "web"}
    assert type(row.columns["good"]) is int
    assert row.fields == {"text": "t", "meta": {"a": 1}, "none": None}


def test_a_numeric_label_is_also_a_column() -> None:
    assert made({"text": "t", "label": True}).columns == {"label": 1}
    assert made({"text": "t", "label": "good"}).columns == {}


def test_several_fitting_shapes_need_a_choice() -> None:
    record = {"prompt": "q", "completion": "a", "text": "qa"}
    with pytest.raises(LuthierError, match=r"fit several shapes: prompt\+completion, text") as several:
        made(record)
    assert several.value.where == "file.jsonl:7" and "rows.format=" in several.value.fix
    assert made(record, "text").columns == {"prompt": "q", "completion": "a"}
    assert made(record, "completion+prompt").shape == "prompt+completion"
    assert made({"instruction": "i", "output": "o", "text": "t"}, "instruction").columns == {"text": "t"}


def test_an_unknown_shape_names_keys_and_near_names() -> None:
    with pytest.raises(LuthierError, match="`mesages`, `n` fit no known shape") as unknown:
        made({"mesages": [], "n": 1})
    assert "did you mean `messages`?" in unknown.value.fix and "prompt+completion" in unknown.value.fix
    with pytest.raises(LuthierError, match="unknown format of rows `mesage`") as misnamed:
        made({"text": "t"}, "mesage")
    assert "`messages`" in misnamed.value.fix
    with pytest.raises(LuthierError, match="the row has no `completion`; it has `prompt`"):
        made({"prompt": "q"}, "prompt+completion")


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"text": ""}, "`text` is empty"),
    ({"text": " \n"}, "`text` is empty"),
    ({"text": None}, "`text` must be text, not null"),
    ({"text": 5}, "`text` must be text, not a number"),
    ({"text": True}, "`text` must be text, not true or false"),
    ({"prompt": "q", "completion": ""}, "`completion` is empty"),
    ({"prompt": {"a": 1}}, "`prompt` must be text, not an object"),
    ({"messages": []}, "`messages` is empty"),
    ({"messages": "hi"}, "`messages` must be a list of messages {role, content}, not text"),
    ({"messages": ["hi"]}, "`messages[0]` must be an object {role, content}, not text"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "`messages[1].content` must be text, not null"),
    ({"messages": [USER, {"role": "assistant"}]}, "`messages[1]` has no `content`"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "`messages[1].content` is empty"),
    ({"messages": [{"role": "asistant", "content": "a"}]}, "`messages[0]` has the unknown role 'asistant'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "`messages[0].content` holds a part that is not text; only text can be learned from",
    ),
    ({"messages": [USER], "tools": "[{"}, "`tools` is text but not JSON"),
    ({"messages": [USER], "tools": [1]}, "`tools` must be a list of objects"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "`conversations[0]` is from the unknown role 'robot'"),
    ({"conversations": [{"from": "human"}]}, "`conversations[0]` must be an object {from, value}"),
    ({"conversations": "x"}, "`conversations` must be a list of {from, value}, not text"),
    ({"prompt": "q", "completion": [USER]}, "`completion` must begin with an assistant message"),
    ({"instruction": "i", "input": 3, "output": "o"}, "`input` must be text, not a number"),
    ({"text": "t", "label": ["x", "x"]}, "`label` names a label twice"),
    ({"text": "t", "label": None}, "`label` must be text, not null"),
    ({"prompt": "q", "answer": []}, "`answer` is empty"),
    ({"prompt": "q", "answer": 0.5}, "`answer` must be text, not a number"),
    ({"prompt": "q", "answers": [], "scores": []}, "`answers` is empty"),
    ({"prompt": "q", "answers": "a", "scores": [1]}, "`answers` must be a list, not text"),
    ({"prompt": "q", "answers": ["a"], "scores": 1}, "`scores` must be a list, not a number"),
    ({"prompt": "q", "answers": ["a", "b"], "scores": [1]}, "the row has 2 answers and 1 scores"),
    ({"prompt": "q", "answers": ["a", "b"], "scores": [1, None]}, "`scores[1]` is None, which is no number"),
    ({"prompt": "q", "answers": ["a", "b"], "scores": [float("nan"), 1]}, "`scores[0]` is nan, which is no number"),
    ({"prompt": "q", "answers": ["a", ""], "scores": [0, 1]}, "`answers[1]` is empty"),
    ({"prompt": "q", "choices": ["x"], "answer": 0}, "`choices` must be a list of at least two texts"),
    ({"prompt": "q", "choices": ["x", "x"], "answer": 0}, "`choices` holds the same text twice"),
    ({"prompt": "q", "choices": ["x", "y"], "answer": 2}, "`answer` is 2, but the choices are numbered 0 to 1"),
    ({"prompt": "q", "choices": ["x", "y"], "answer": -1}, "`answer` is -1, but the choices are numbered 0 to 1"),
    ({"prompt": "q", "choices": ["x", "y"], "answer": "z"}, "`answer` is 'z', which is neither one of the choices"),
]


@pytest.mark.parametrize(("record", "reason"), UNUSABLE)
def test_unusable_records_say_why_and_where(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(LuthierError) as refused:
        made(record)
    assert refused.value.what.startswith(reason)
    assert refused.value.where == "file.jsonl:7"


def test_messages_of_columnar_files_lose_their_nulls() -> None:
    message = {"role": "user", "content": "q", "tool_calls": None, "name": "ann"}
    assert made({"messages": [message]}).fields["messages"] == [{"role": "user", "content": "q", "name": "ann"}]


def test_calls_need_no_words_and_system_may_be_empty() -> None:
    calls = [{"function": {"name": "add"}}]
    messages = [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    row = made({"messages": messages, "tools": '[{"name": "add"}]'})
    assert row.fields["messages"][0]["content"] == ""
    written = [{"function": {"name": "add", "arguments": {}}}]
    assert row.fields["messages"][2] == {"role": "assistant", "content": "", "tool_calls": written}
    assert row.fields["tools"] == [{"name": "add"}]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert made({"messages": [{"role": "user", "content": parts}]}).fields["messages"][0]["content"] == "ab"


def test_a_completion_that_repeats_the_prompt_is_learned_once() -> None:
    row = made({"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [ASSISTANT]})
    assert row.fields["chosen"] == row.fields["rejected"] == [ASSISTANT]


def test_one_error_names_five_of_many() -> None:
    bad = [BadRow(f"f:{line}", "broken", "fix it") for line in range(1, 8)]
    error = bad_rows_error(bad, 20)
    assert error.what.startswith("7 of 20 rows cannot be used") and "f:5: broken" in error.what
    assert "f:6" not in error.what and "and 2 more" in error.what
    assert error.fix.count("fix it") == 1 and "on_bad_row" in error.fix
    assert bad_rows_error(bad[:1], 20).what == "broken"


def test_five_bad_rows_are_all_of_them() -> None:
    bad = [BadRow(f"row {number}", f"reason {number}", f"fix {number}") for number in range(6)]
    five = bad_rows_error(bad[:5], 9)
    assert five.what == "5 of 9 rows cannot be used:" + "".join(f"\n    row {number}: reason {number}" for number in range(5))
    assert five.fix.startswith("fix 0; fix 1; fix 2; fix 3; fix 4; or leave")
    six = bad_rows_error(bad, 9)
    assert six.what.endswith("row 4: reason 4\n    and 1 more") and "fix 4" in six.fix and "fix 5" not in six.fix


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (
            {"question": "q", "choices": ["a", "b"]},
            "`question`, `choices`, and lacks `answer` for the shape question+choices+answer",
        ),
        ({"chosen": "a"}, "`chosen`, and lacks `rejected` for the shape chosen+rejected"),
    ],
)
def test_what_is_lacking_is_told_of_the_shape_that_is_nearest(record: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError) as told:
        made(record)
    assert told.value.what == f"the row has {what}"


def test_texts_of_three_words_and_lists_of_texts_are_told_as_unread() -> None:
    """Shorter ones name something, such as a source."""
    row = made({"text": "t", "source": "the web", "note": "three words here", "more": {"a": [1, "b"]}, "counts": [[1], [2]]})
    assert unread(row) == ["more", "note"]
