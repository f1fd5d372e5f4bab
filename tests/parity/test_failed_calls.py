"""TL-Training's first stage: which turns are context only, and that this is the paper's cutting of a conversation into turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.batches import collate
from luthier.rows.encode import encode_all
from luthier.rows.read import read
from luthier.rows.shapes import Row
from tests.conftest import split
from tests.faults.test_faults_templates import learned
from tests.faults.test_faults_tool_turns import CHATML_TOOLS
from tests.toys.helpers import gap, gradients

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
USER = {"role": "user", "content": "1+1?"}


def turn(content: str = "", *, calls: int = 0) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **({"tool_calls": [CALL] * calls} if calls else {})}


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


def mapped(*messages: dict[str, Any], **options: Any) -> Row:
    (row,) = luthier.part("failed_calls", **options).values[0].map(list(read([{"messages": list(messages)}])), None)
    return row


def context(*messages: dict[str, Any], **options: Any) -> list[int]:
    """The places of the messages that are context only."""
    return [place for place, one in enumerate(mapped(*messages, **options).fields["messages"]) if one.get("learn") is False]


def test_a_call_that_fails_is_context_of_the_one_that_works() -> None:
    """Call, error, call, ok: the second is learned alone, and what it follows still holds the failed one."""
    tokenizer = tiny_tokenizer()
    messages = [USER, turn("ad(1, 1)"), reply("name 'ad' is not defined"), turn("add(1, 1)"), reply("2")]
    row = mapped(*messages)
    (encoded,) = encode_all([row], tokenizer).rows
    assert learned(encoded, tokenizer) == ["add(1, 1)<|im_end|>"]
    assert "ad(1, 1)" in tokenizer.decode(encoded.token_ids[: encoded.supervised.index(True)])


def test_masking_is_the_cutting_into_turns(engine: Any, now: Now) -> None:
    """The paper makes a row of each learned turn, up to its end; the gradient of the masked conversation is that of these rows."""
    messages = [
        USER,
        turn("ad(1, 1)"),
        reply("name 'ad' is not defined"),
        turn("add(1, 1)"),
        reply("2"),
        turn("Two."),
    ]
    tokenizer = tiny_tokenizer()
    whole = collate(encode_all([mapped(*messages)], tokenizer).rows)
    cut = [{"messages": messages[: stop + 1]} for stop in (3, 5)]
    parts = collate(encode_all(read(cut), tokenizer, loss_on="last").rows)
    assert whole.supervised == parts.supervised
    one, two = (gradients(engine(), [batch], now) for batch in (whole, parts))
    # Attention normalizes in fp32.
    assert gap(one, two) < 1e-6
    plain = gradients(engine(), [collate(encode_all(read([{"messages": messages}]), tokenizer).rows)], now)
    assert gap(one, plain) > 1e-3
    assert gap(gradients(engine(), split(parts, (1, 1)), now), two) < 1e-10


@pytest.mark.parametrize(
    ("content", "fails"),
    [
        ("f() got an unexpected  keyword argument 'x'", True),
        ("ConnectionError: refused", True),
        ("CONNECTION-ERROR", True),
        ("400 Client Error: Bad Request", True),
        ("no errors found", False),
        ("errors: none", False),
        ('{"error": "city is not known"}', True),
        ("{'error': 'city is not known'}", True),
        ('{"error": null, "note": "x is not defined"}', False),
        ('{"error": "", "value": 2}', False),
        ('{"is_error": "false"}', False),
        ('{"is_error": true}', True),
        ('{"status": "Error"}', True),
        ('{"status": "success", "text": "not supported"}', False),
        ('{"status": "active", "text": "not supported"}', True),
        ('{"status": "active"}', False),
        ('{"status": 404}', True),
        ('{"status": 400}', True),
        ('{"status": 399}', False),
        ('{"status": 200, "text": "not supported"}', False),
        ('{"status": false}', True),
        ('{"error": null, "status": "failed"}', True),
        ("{broken, is not defined", True),
        ("{" * 5000, False),
        ("", False),
    ],
)
def test_which_replies_report_an_error(content: str, fails: bool) -> None:
    assert context(USER, turn("add()"), reply(content), turn("2")) == ([1] if fails else [])


def test_what_a_message_says_itself_comes_first() -> None:
    assert context(USER, turn("add()"), reply("2", is_error=True), turn("2")) == [1]
    assert context(USER, turn("add()"), reply("add is not defined", is_error=False), turn("2")) == []
    assert context(USER, turn("add()"), reply("2", status="error"), turn("2")) == [1]


def test_which_turns_are_judged() -> None:
    fails = reply("add is not defined")
    assert context(USER, turn("Hello."), USER, turn("2")) == [], "a turn that calls no tool"
    assert context(USER, turn(calls=1), USER, turn("2")) == [1], "a call without a reply"
    assert context(USER, turn(calls=1), reply("2"), turn("2")) == []
    assert context(USER, turn(calls=1)) == [], "the last message"
    assert context(USER, turn(calls=1), fails) == [1], "not the last message"
    assert context(USER, turn(calls=2), reply("2"), fails, turn("2")) == [1], "one of two replies"
    assert context(USER, turn(calls=1), reply("2"), turn(calls=1), fails, turn("2")) == [3]
    assert context(USER, {**turn("x"), "learn": False}, USER, turn("2")) == [1]
    assert context(USER, {"role": "user", "content": "?"}, fails, turn("2")) == []


def test_markers_are_an_option() -> None:
    messages = (USER, turn("add()"), reply("Out of LUCK!"), turn("2"))
    assert context(*messages) == [] and context(*messages, markers=("of-luck",)) == [1]
    assert context(USER, turn("add()"), reply("add is not defined"), turn("2"), markers=()) == []
    with pytest.raises(LuthierError, match="the marker '!' has no letter"):
        luthier.part("failed_calls", markers=("x", "!"))


def test_other_shapes() -> None:
    said = [turn("add()"), reply("add is not defined"), turn("2")]
    rows = read([{"prompt": "?", "completion": said}, {"prompt": "?", "completion": "add()"}, {"text": "add is not defined"}])
    one, *others = luthier.part("failed_calls").values[0].map(list(rows), None)
    assert [message.get("learn") for message in one.fields["completion"]] == [False, None, None]
    assert others == list(rows)[1:]


def test_reduces_to_the_same_rows_where_nothing_fails() -> None:
    rows = list(read([{"messages": [USER, turn("add()"), reply("2"), turn("2")]}, {"prompt": "a", "completion": "b"}]))
    assert luthier.part("failed_calls").values[0].map(rows, None) == rows


def test_a_run_says_how_many_turns_it_leaves_out(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, turn("ad()"), reply("ad is not defined"), turn("ad()"), reply("ad is not defined"), turn("add()")]},
        {"messages": [USER, turn("ad()"), reply("ad is not defined")]},
        {"messages": [USER, {**turn("3"), "learn": False}, USER, turn("2")]},
    ]
    train = {"steps": 1, "batch_rows": 2, "precision": "fp32"}
    recipe = {"model": "tiny:llama", "rows": {"train": rows, "map": "failed_calls"}, "train": train, "out": str(tmp_path)}
    plan = make_plan(make_recipe(recipe))
    told = "failed_calls: 3 assistant turns in 2 of 3 rows are context only"
    assert any(line.strip() == told for line in plan.lines())
    assert len(plan.rows.rows) == 2 and "learn: false" in plan.rows.dropped[0].reason
    assert plan.rows.supervised_tokens == len("add()") + len("2") + 2
    facts = luthier.train(recipe).facts
    assert facts["rows"]["mapped"] == [told] and told in "\n".join(facts["plan"])


def test_calls_in_a_template_of_tools() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML_TOOLS
    row = mapped(USER, turn(calls=1), reply("error", status="error"), turn(calls=1), reply("2"), turn("Two."))
    (encoded,) = encode_all([row], tokenizer).rows
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert learned(encoded, tokenizer) == [call, "Two.<|im_end|>"]
    assert torch.tensor(encoded.supervised).sum() < len(encoded)
