"""What a row holds and its text does not, by writers that are made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.rows.unwritten import CALLS, Dialogue, Lost, lost_calls, lost_keys, unwritten

Messages = Sequence[dict[str, Any]]
USER = {"role": "user", "content": "q"}


def words(messages: Messages) -> str:
    return "|".join(message["content"] for message in messages)


def but_the_first_two(messages: Messages) -> str:
    """Writes all calls but the first that is 2."""
    found = []
    for message in messages:
        calls = list(message.get(CALLS) or [])
        if 2 in calls:
            calls.remove(2)
        found.append(f"{message['content']}{calls}")
    return "|".join(found)


@pytest.mark.parametrize(("calls", "lost"), [([1, 2, 3], [1]), ([1, 2], [1]), ([2], []), ([1, 3, 4], []), ([1, 3], [])])
def test_calls_of_which_some_are_not_written(calls: list[int], lost: list[int]) -> None:
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "", CALLS: calls}, USER]
    assert lost_calls(messages, but_the_first_two(messages), but_the_first_two) == lost


def test_a_key_that_says_what_another_says_is_not_lost() -> None:
    def write(messages: Messages) -> str:
        return "|".join(message["content"] + message.get("reasoning", "") for message in messages)

    twice = [USER, {"role": "assistant", "content": "a", "reasoning": "so", "thinking": "so"}]
    assert lost_keys(twice, write(twice), write) == []
    within = [USER, {"role": "assistant", "content": "a red fox", "note": "red"}]
    assert lost_keys(within, write(within), write) == [Lost(1, "note")]


def test_what_is_not_written_is_noted_or_refused() -> None:
    def write(dialogue: Dialogue) -> str:
        return words(dialogue.messages) + str(dialogue.options.get("a"))

    turns: list[dict[str, Any]] = [{**USER, "name": "n"}, {"role": "assistant", "content": "a", "reasoning": "because"}]
    dialogue = Dialogue(turns, 0, None, "", "here", options={"a": 1, "b": 2})
    assert unwritten(dialogue, write(dialogue), write, [1], "it") == (
        "it does not read the row's `b`",
        "it does not write `name` of user turns",
        "it does not write `reasoning` of assistant turns",
    )
    nothing = Dialogue([USER, {"role": "assistant", "content": "", CALLS: [1]}], 0, None, "", "here")
    with pytest.raises(LuthierError, match="it does not write `tool_calls`, and an assistant's turn to learn holds nothing else"):
        unwritten(nothing, write(nothing), write, [1], "it")
