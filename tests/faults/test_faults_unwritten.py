"""What a row holds and its text does not: noted, and refused where it is all that a turn says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.models.tiny import tiny_tokenizer
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.rows.cache import keep
from luthier.rows.chat import SPECIAL, form_of
from luthier.rows.chunks import Encoding
from luthier.rows.encode import encode, encode_all
from luthier.rows.look import look
from luthier.rows.read import read
from luthier.rows.sources import Streamed
from tests.faults.test_faults_templates import CHATML, LLAMA3, byte_level, conversation, encoded, learned
from tests.faults.test_faults_tool_turns import PHI_TOOLS
from tests.unit.test_rows_look import shown

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WRITES_ALL = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for d in documents or [] %}{{ '<|im_start|>document\\n' + d.text + '<|im_end|>\\n' }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
JOINS_ARGUMENTS = WRITES_ALL.replace("c.function | tojson", "c.function.name + c.function.arguments")
PRINTS_ARGUMENTS = WRITES_ALL.replace(
    "{{ '<call>' + c.function | tojson + '</call>' }}", "{{ c.function.name }}{{ c.function.arguments }}"
)


def called(content: str | None = None, **other: Any) -> dict[str, Any]:
    """A question and a call."""
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL], **other}
    return {"messages": [{"role": "user", "content": "Rain?"}, answer], "tools": [TOOL]}


def noted(record: dict[str, Any], template: str) -> tuple[str, ...]:
    """What is said of a row."""
    return encoded(record, byte_level(template)).notes


def test_a_call_that_is_all_of_a_turn_is_never_learned_as_silence() -> None:
    """A template without calls made an empty turn of a call, and the model learned to say nothing."""
    found = look([called(), called("")], byte_level(CHATML))
    assert [bad.reason for bad in found.skipped] == [
        "the chat template does not write `tool_calls`, and an assistant's turn to learn holds nothing else"
    ] * 2
    assert found.supervised_tokens == 0
    assert learned(encoded(called(), byte_level(WRITES_ALL)), byte_level(WRITES_ALL))[0].startswith("<call>")
    context = called(learn=False)
    context["messages"] += conversation("and?", "no")["messages"]
    tokenizer = byte_level(CHATML)
    assert learned(encoded(context, tokenizer), tokenizer) == ["no<|im_end|>"]


def test_whatever_a_template_does_not_write_is_noted_with_its_first_row() -> None:
    """Calls beside words, tools, reasoning, names and system texts vanished without a word."""
    record = called("Let me look.", reasoning_content="rain is wet", name="bot")
    who = "the chat template does not write "
    assert noted(record, CHATML) == (
        f"{who}the row's `tools`",
        f"{who}`tool_calls` of assistant turns",
        f"{who}`name` of assistant turns",
    )
    assert noted(record, WRITES_ALL) == (f"{who}`name` of assistant turns",)
    deaf = WRITES_ALL.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert noted(conversation("hi", "yes", system="Be kind."), deaf) == (f"{who}`content` of system turns",)
    rows = [{"id": "0", **conversation("hi", "yes")}, *[{"id": one, **record} for one in ("a", "b")]]
    told = f"{who}`name` of assistant turns (2 rows, the first: row 2 (row a))"
    assert told in shown(look(rows, byte_level(WRITES_ALL)))


def test_reasoning_by_any_name_is_written_or_noted() -> None:
    """A template that reads one name for reasoning is given the others by the library; where it reads none, it stands before the words."""
    for name in ("reasoning_content", "reasoning", "thinking"):
        record = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", name: "two and two"}]}
        plain = byte_level(CHATML)
        assert learned(encoded(record, plain), plain) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]
        assert noted(record, CHATML) == ()
        tokenizer = byte_level(WRITES_ALL)
        assert learned(encoded(record, tokenizer), tokenizer) == ["<think>two and two</think>4<|im_end|>"]


def test_a_key_that_only_some_turns_lose_is_noted() -> None:
    """Templates that write the first of several calls, or the reasoning of the last turn alone, lose the others."""
    two = called()
    two["messages"][1]["tool_calls"] = [CALL, {**CALL, "function": {"name": "time", "arguments": {}}}]
    del two["tools"]
    assert noted(two, PHI_TOOLS) == ("the chat template writes only some of the calls of a turn",)
    last = WRITES_ALL.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.index0 > 1 %}")
    turns = conversation("a", "b", "c", "d")
    for place in (1, 3):
        turns["messages"][place]["reasoning_content"] = f"thought {place}"
    turns["messages"][1]["learn"] = False
    assert noted(turns, last) == ("the chat template does not write `reasoning_content` of assistant turns",)


def test_documents_and_options_of_a_row_reach_its_template() -> None:
    """A row's `documents` and `chat_template_kwargs` were read by nothing."""
    plain = {**conversation("hi", "yes"), "documents": [{"text": "a far land"}], "chat_template_kwargs": {"mood": "glad"}}
    tokenizer = byte_level("{{ mood | default('') }}" + WRITES_ALL)
    row = encoded(plain, tokenizer)
    assert tokenizer.decode(row.token_ids).startswith("glad<|im_start|>document\na far land<|im_end|>") and row.notes == ()
    assert noted(plain, CHATML) == tuple(f"the chat template does not read the row's `{key}`" for key in ("documents", "mood"))


def test_other_text_of_a_row_is_noted_and_columns_are_not() -> None:
    """Text beside a shape, such as the passage a question is about, never reached the model, and nothing said so."""
    row = {"question": "Where?", "answer": "Oslo", "context": "Oslo", "hint": "it is a town", "source": "web", "score": 0.5}
    tokenizer = tiny_tokenizer()
    (one,) = read([{**row, "embedding": [0.1, 0.2], "metadata": {"by": "me"}}])
    assert encode(one, tokenizer).notes == tuple(f"the row's `{key}` is no part of its text" for key in ("context", "hint"))
    (document,) = read([{"text": "a", "images": ["a.png"]}])
    assert encode(document, tokenizer).notes == ("the row's `images` is no part of its text",)


@pytest.mark.parametrize("template", [WRITES_ALL, JOINS_ARGUMENTS, PRINTS_ARGUMENTS])
def test_arguments_are_written_alike_as_text_and_as_objects(template: str) -> None:
    """Arguments given as JSON text were encoded a second time, and objects failed or became Python's own notation."""
    tokenizer = byte_level(template)
    as_text = called()
    as_text["messages"][1]["tool_calls"] = [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
    said = learned(encoded(as_text, tokenizer), tokenizer)
    assert said == learned(encoded(called(), tokenizer), tokenizer)
    assert '{"city": "Oslo"}' in said[0] and encoded(as_text, tokenizer).notes == ()


def test_arguments_that_are_no_object_are_noted() -> None:
    """Broken arguments became a text in quotes without a word."""
    broken = called()
    broken["messages"][1]["tool_calls"] = [{**CALL, "function": {"name": "weather", "arguments": '{"city": '}}]
    assert noted(broken, WRITES_ALL) == ("the arguments of a tool call are text that is no JSON object",)


def test_special_tokens_are_noted_wherever_they_stand() -> None:
    """Special tokens in a call, a tool, a document or a prompt alone were read as tokens without the note that content gets."""
    end = "bye<|im_end|> more"
    call = called()
    call["messages"][1]["tool_calls"] = [{**CALL, "function": {"name": "say", "arguments": {"text": end}}}]
    tool = {**called(), "tools": [{**TOOL, "description": end}]}
    assert noted(call, WRITES_ALL) == noted(tool, WRITES_ALL) == (SPECIAL,)
    tokenizer = tiny_tokenizer()
    documents = read([{"text": "whole<|im_end|>"}, {"text": f"a {end}"}])
    assert [encode(row, tokenizer).notes for row in documents] == [(), (SPECIAL,)]
    assert encode(documents[1], tokenizer, purpose="prompt").notes == (SPECIAL,)
    assert look([{"prompt": end}], tokenizer).notes == {SPECIAL: 1}


@pytest.mark.parametrize("template", [WRITES_ALL, CHATML, LLAMA3])
def test_a_greeting_is_learned(template: str) -> None:
    """A conversation that the assistant opens lost its first turn, and the template was blamed."""
    tokenizer = byte_level(template)
    greeting = {"messages": [{"role": "assistant", "content": "Ahoy."}, *conversation("Where?", "Left.")["messages"]]}
    row = encoded(greeting, tokenizer)
    assert [said.removesuffix("<|eot_id|>").removesuffix("<|im_end|>") for said in learned(row, tokenizer)] == ["Ahoy.", "Left."]
    assert row.notes == ()
    alone = encoded({"messages": greeting["messages"][:1]}, tokenizer)
    assert len(learned(alone, tokenizer)) == 1


def test_a_greeting_that_cannot_be_asked_for_says_so() -> None:
    """Where no generation prompt can be found before a greeting, the reason is that, and no other."""
    unasked = WRITES_ALL.replace("<|im_start|>assistant\\n' }}{% endif %}", "<|im_start|>bot\\n' }}{% endif %}")
    row = encoded({"messages": [{"role": "assistant", "content": "Ahoy."}]}, byte_level(unasked))
    said = "the chat template cannot be asked for an assistant turn that opens a conversation: such turns are context only"
    assert (row.notes, any(row.supervised)) == ((said,), False)


def test_streamed_rows_keep_notes_and_where_they_came_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note of streamed rows is that of rows in memory, with the same first row."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (conversation("a", "b"), {"text": "a <|im_end|> b"})))
    tokenizer = tiny_tokenizer()
    streamed = keep([Streamed("rows", path)], Encoding(form_of(tokenizer), "assistant", None, "refuse")).rows
    kept = encode_all(read(path), tokenizer)
    told = [{key: vars(one).get(key) for key in ("notes", "first_noted")} for one in (streamed, kept)]
    first = f"{path}:2 (row {kept.rows[1].id})"
    assert told == [{"notes": {SPECIAL: 1}, "first_noted": {SPECIAL: first}}] * 2


def test_turns_that_a_template_does_not_mark_are_noted() -> None:
    """Where a template marks what is generated, a turn without a mark became context without a word."""
    marked = WRITES_ALL.replace(
        "{{ m.content }}", "{% if m.content %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    )
    record = called()
    record["messages"] += conversation("and?", "no")["messages"]
    tokenizer = byte_level(marked)
    row = encoded(record, tokenizer)
    said = "the chat template marks nothing of an assistant turn as generated: that turn is context only"
    assert (learned(row, tokenizer), row.notes) == (["no<|im_end|>"], (said,))


def test_a_plan_warns_of_what_measured_rows_lose(tmp_path: Path) -> None:
    """Rows that are only measured lost their tools without a word: notes were made of training rows alone."""
    measured = {"id": "m", **conversation("Rain?", "yes"), "tools": [TOOL]}
    rows = {"train": [conversation("hi", "yes")]}
    recipe = {"model": "tiny:llama", "rows": rows, "evaluate": {"asked": {"rows": [measured], "metric": "loss"}}}
    assert make_plan(make_recipe(recipe)).warnings() == [
        "evaluation set `asked`: the chat template does not write the row's `tools` (1 rows, the first: row 1 (row m))"
    ]


def test_a_prompt_says_what_it_lost() -> None:
    """Prompts lost their tools without a note, where they were only asked and not learned."""
    asked = {"prompt": "Rain?", "tools": [TOOL]}
    assert look([asked], byte_level(CHATML)).notes == {"the chat template does not write the row's `tools`": 1}
    with pytest.raises(LuthierError, match="sets `tokenize`"):
        read([{**asked, "chat_template_kwargs": {"tokenize": True}}])
