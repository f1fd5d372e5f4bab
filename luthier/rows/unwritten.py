"""What a row holds and its text does not: found by leaving it out and writing the row again.

A chat template is a program: what it reads cannot be told from its source. A key whose absence changes nothing is not written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from luthier.errors import LuthierError
from luthier.rows.messages import Message

CALLS = "tool_calls"
_ALWAYS = ("role", "content")


@dataclass(frozen=True)
class Dialogue:
    """Messages to be written.

    Args:
        messages: as a chat template is given them.
        given: how many of them are a prompt, and never labels.
        tools: what the row offers.
        joint: stands between messages where there is no template.
        where: for errors.
        context: the places of messages that are never labels, either.
        options: what the row itself gives the template.
        notes: what the row itself deserves.
    """

    messages: Sequence[Message]
    given: int
    tools: list[Any] | None
    joint: str
    where: str
    context: frozenset[int] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Lost(NamedTuple):
    """A key of a message that is not written."""

    place: int
    key: str


Write = Callable[[Sequence[Message]], str | None]
"""Writes other messages in the same way; None where they cannot be written."""


def unwritten(dialogue: Dialogue, text: str, write: Callable[[Dialogue], str], learned: Sequence[int], who: str) -> tuple[str, ...]:
    """Notes on what a row holds and its text does not.

    Args:
        dialogue: what was written.
        text: as what.
        write: writes another dialogue in the same way.
        learned: the places of the turns to learn.
        who: writes them, in words.

    Raises:
        LuthierError: a turn to learn holds nothing that is written.
    """

    def tried(other: Dialogue) -> str | None:
        try:
            return write(other)
        except LuthierError:
            return None

    def of_messages(messages: Sequence[Message]) -> str | None:
        return tried(replace(dialogue, messages=messages))

    notes = []
    if dialogue.tools and tried(replace(dialogue, tools=None)) == text:
        notes.append(f"{who} does not write the row's `tools`")
    for key in (key for key, value in dialogue.options.items() if value is not None):
        rest = {name: value for name, value in dialogue.options.items() if name != key}
        if tried(replace(dialogue, options=rest)) == text:
            notes.append(f"{who} does not read the row's `{key}`")
    lost = lost_keys(dialogue.messages, text, of_messages)
    for index in learned:
        turn = dialogue.messages[index]
        gone = [one.key for one in lost if one.place == index]
        if gone and not turn["content"].strip() and not any(turn[key] for key in turn if key not in (*_ALWAYS, *gone)):
            raise LuthierError(
                f"{who} does not write {_listed(gone)}, and an assistant's turn to learn holds nothing else",
                where=dialogue.where,
                fix="use a model whose chat template writes them, or mark the turn with `learn: false`",
            )
    # Whether the words of a learned turn are written is found, and said, where its place in the text is.
    kept = [one for one in lost if not (one.key == "content" and one.place in learned)]
    notes += [f"{who} does not write `{one.key}` of {dialogue.messages[one.place]['role']} turns" for one in kept]
    if any((place, CALLS) not in lost for place in lost_calls(dialogue.messages, text, of_messages)):
        notes.append(f"{who} writes only some of the calls of a turn")
    return tuple(dict.fromkeys(notes))


def lost_keys(messages: Sequence[Message], text: str, write: Write) -> list[Lost]:
    """The keys of messages that hold something and are not in their text."""

    def changes(*places: int, key: str, to: Any = None) -> bool:
        other = [
            {name: to if name == key else part for name, part in message.items() if name != key or to is not None}
            if place in places
            else message
            for place, message in enumerate(messages)
        ]
        return write(other) != text

    found: list[Lost] = []
    for key in dict.fromkeys(name for message in messages for name in message if name not in _ALWAYS):
        holders = [place for place, message in enumerate(messages) if message.get(key) and not _said_twice(message, key, text)]
        # Most keys are written everywhere or nowhere: one more writing tells the second at once.
        nowhere = bool(holders) and not changes(*holders, key=key)
        found += [Lost(place, key) for place in holders if nowhere or (len(holders) > 1 and not changes(place, key=key))]
    for place, message in enumerate(messages):
        words = message["content"].strip()
        if words and words not in text and not changes(place, key="content", to=""):
            found.append(Lost(place, "content"))
    return found


def lost_calls(messages: Sequence[Message], text: str, write: Write) -> list[int]:
    """The places of messages with several calls, of which some are not written."""
    found = []
    for place, message in enumerate(messages):
        calls = message.get(CALLS) or []
        fewer = ([*calls[:one], *calls[one + 1 :]] for one in range(len(calls))) if len(calls) > 1 else ()
        if any(write([*messages[:place], {**message, CALLS: some}, *messages[place + 1 :]]) == text for some in fewer):
            found.append(place)
    return found


def has_special(value: Any, special: re.Pattern[str] | None) -> bool:
    """Whether any text within a value holds a special token."""
    if isinstance(value, str):
        return special is not None and special.search(value) is not None
    if isinstance(value, Mapping):
        return any(has_special(part, special) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple) and any(has_special(part, special) for part in value)


def _said_twice(message: Message, key: str, text: str) -> bool:
    """Whether another key says the same and is written: one of them can be left out, and nothing is lost."""
    said = message[key]
    return isinstance(said, str) and said.strip() in text and any(part == said for name, part in message.items() if name != key)


def _listed(keys: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)
