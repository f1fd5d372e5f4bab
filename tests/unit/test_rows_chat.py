"""Which characters of a conversation are learned, by templates that write it in unusual ways."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.models.tiny import tiny_tokenizer
from luthier.rows.chat import BEGINS, OPENS, PLAIN, REWRITES, LossOn, Rendered, _narrowed, form_of, render_prompt, render_training
from luthier.rows.messages import with_written_arguments
from luthier.rows.read import read

END = "<|im_end|>"
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
NEVER_EMPTY = (
    "{% if messages[0].role == 'user' %}[asked]{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def written(template: str | None, *messages: str, loss_on: LossOn = "assistant") -> Rendered:
    """Turns such as `user: q`; one that begins with `-` is context only."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = template
    turns: list[dict[str, Any]] = []
    for one in messages:
        role, _, content = one.removeprefix("-").partition(": ")
        turns.append({"role": role, "content": content, **({"learn": False} if one.startswith("-") else {})})
    return render_training(read([{"messages": turns}])[0], form_of(tokenizer), loss_on)


def targets(found: Rendered) -> list[str]:
    return [found.text[start:end] for start, end in found.targets]


def test_a_template_that_ends_no_turn_ends_the_last_with_the_tokenizer_s_own_token() -> None:
    found = written(ENDLESS, "user: q", "assistant: a", "user: r", "assistant: b")
    assert found.text == f"user: q\nassistant: a\nuser: r\nassistant: b\n{END}"
    assert targets(found) == ["a\n", f"b\n{END}"] and found.notes == ()
    assert targets(written(ENDLESS, "user: q", "assistant: a", "user: r", "assistant: b", loss_on="last")) == [f"b\n{END}"]
    assert not written(ENDLESS, "user: q", "assistant: a", "user: r").text.endswith(END)


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        (("user: q", "-assistant: a"), ["user: q\n"]),
        (("-user: q", "assistant: a"), [f"assistant: a\n{END}"]),
        (("user: q", "-assistant: a", "user: r", "assistant: b"), ["user: q\n", f"user: r\nassistant: b\n{END}"]),
        (("user: q", "assistant: a", "-user: r", "-assistant: b"), ["user: q\nassistant: a\n"]),
    ],
)
def test_all_text_but_for_turns_that_are_context(turns: tuple[str, ...], wanted: list[str]) -> None:
    assert targets(written(ENDLESS, *turns, loss_on="all")) == wanted


def test_an_assistant_turn_that_opens_a_conversation() -> None:
    """Such a template cannot write a conversation without turns, so that turn begins behind the generation prompt that others have."""
    found = written(NEVER_EMPTY, "assistant: Hi", "user: q", "assistant: b")
    assert targets(found) == [f"Hi{END}", f"b{END}"] and found.notes == ()
    silent = NEVER_EMPTY.replace("<|im_start|>assistant\n{% endif %}", "{% endif %}")
    assert (targets(written(silent, "assistant: Hi")), written(silent, "assistant: Hi").notes) == ([], (OPENS,))
    plain = written(None, "assistant: a")
    assert (targets(plain), plain.notes) == ([f"a{END}"], (PLAIN,))


def test_a_conversation_that_ends_with_a_question_is_written_once() -> None:
    found = written(ENDLESS, "user: q", "assistant: a", "user: r")
    assert found.text == "user: q\nassistant: a\nuser: r\n"
    assert targets(found) == ["a\n"]


def test_a_generation_prompt_that_answers_lack_is_told_of_the_last_answer() -> None:
    other = ENDLESS.replace("assistant: ", "Answer: ")
    assert written(other, "user: q", "assistant: a").notes == (BEGINS.format(words="Answer: "),)
    assert written(other, "user: q", "assistant: a", "user: r").notes == (REWRITES,)


def test_marks_are_taken_where_they_lie_in_the_turn() -> None:
    """Those that only touch it are others' marks; the last one goes on to the end of the turn."""
    assert _narrowed((10, 20), [(5, 10), (12, 15), (20, 25)]) == [(12, 20)]
    assert _narrowed((10, 20), [(8, 12), (14, 16)]) == [(10, 12), (14, 20)]
    assert _narrowed((10, 20), [(2, 4), (20, 22)]) == []


def test_of_tokens_that_begin_alike_the_longest_ends_a_turn() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end"]})
    assert form_of(tokenizer).end_of_turn == END


def test_arguments_as_text_keep_their_letters() -> None:
    call = {"function": {"name": "find", "arguments": {"city": "Zürich"}}}
    (made,) = with_written_arguments({"role": "assistant", "content": "", "tool_calls": [call]})["tool_calls"]
    assert made["function"]["arguments"] == '{"city": "Zürich"}'


def test_tokens_of_the_generation_prompt_end_no_turn() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = ENDLESS.replace("assistant: {% endif %}", "<|im_start|>assistant: {% endif %}")
    assert not form_of(tokenizer).turn_ends_itself


def test_keys_that_a_template_does_not_write_are_noted() -> None:
    tokenizer: Any = tiny_tokenizer()
    call = {"role": "assistant", "content": "a", "function_call": {"name": "f", "arguments": "{}"}}
    (row,) = read([{"messages": [{"role": "user", "content": "q", "name": "Mara"}, call]}])
    assert row.fields["messages"][1] == {
        **{"role": "assistant", "content": "a"},
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    tokenizer.chat_template = ENDLESS
    notes = render_training(row, form_of(tokenizer)).notes
    assert notes[:2] == (
        "the chat template does not write `name` of user turns",
        "the chat template does not write `tool_calls` of assistant turns",
    )


def test_a_document_to_go_on_with_begins_as_the_tokenizer_begins() -> None:
    assert render_prompt(read([{"text": "abc"}])[0], form_of(tiny_tokenizer())).plain
