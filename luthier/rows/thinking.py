"""What becomes of reasoning in assistant turns: kept, kept in the last turn alone, or dropped.

| reasoning in a row | how it is told |
|---|---|
| a key `reasoning_content`, `reasoning` or `thinking` of an assistant's message | whole, whatever it says |
| a content that begins with `<think>` | up to the first `</think>` |

The last turn is all that an assistant says behind the last message of a user, also between calls of tools. What is kept and has a key
that the chat template reads is left to it; where it reads none, the reasoning stands in front of the words, as text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from luthier.errors import LuthierError
from luthier.rows.messages import Message
from luthier.rows.shapes import Row
from luthier.rows.unwritten import Dialogue

Thinking = Literal["keep", "last", "drop"]
FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold reasoning."""
_SHOWN = 80
"""As many characters of a lost text are shown."""
_LOOKED_AT = 1000
_WORD = re.compile(r"\w+|[^\w\s]")
_OPEN, _CLOSE = "<think>", "</think>"
_READS = re.compile(rf"\b({'|'.join(FIELDS)})\b")
SAID = {
    "keep": "is written in every assistant turn",
    "last": "is written in the last assistant turn alone",
    "drop": "is left out of all rows",
}
"""What each choice does with reasoning, for plans."""


def described(rows: Iterable[Row], thinking: Thinking) -> list[str]:
    """What a plan says of reasoning, of the first rows; nothing where none of them holds any."""
    looked = list(islice(rows, _LOOKED_AT))
    holding = sum(any(thought_of(message) for message in _messages(row)) for row in looked)
    return [f"{thinking}: it {SAID[thinking]} ({100 * holding / len(looked):.3g} % of the rows hold some)"] if holding else []


def _messages(row: Row) -> Iterator[Message]:
    """All that an assistant says in a row, alternatives as well."""
    for key in ("messages", "prompt", "completion", "output", "chosen", "rejected"):
        value = row.fields.get(key)
        if isinstance(value, str) and key != "prompt":
            yield {"role": "assistant", "content": value}
        elif isinstance(value, list | tuple):
            yield from value


def reads_fields(template: str) -> bool:
    """Whether a chat template reads reasoning that stands in a key of its own."""
    return _READS.search(template) is not None


def thought_of(message: Message) -> str:
    """The reasoning of an assistant's message; empty where there is none."""
    if message["role"] != "assistant":
        return ""
    held = next((message[key] for key in FIELDS if isinstance(message.get(key), str) and message[key].strip()), "")
    return str(held).strip() or _parted(message["content"])[0]


def without_thought(message: Message) -> Message:
    """An assistant's message with its words and calls alone."""
    rest = {key: part for key, part in message.items() if key not in FIELDS}
    return {**rest, "content": _parted(message["content"])[1]} if thought_of(message) else message


def arranged(messages: Sequence[Message], thinking: Thinking, *, reads: bool, where: str = "") -> list[Message]:
    """Messages in which reasoning stands where it is to be written.

    Args:
        messages: of a row.
        thinking: what becomes of it.
        reads: the chat template reads it in keys of its own.
        where: the row, for errors.

    Raises:
        LuthierError: an assistant says nothing but what is dropped.
    """
    asked = _asked(messages)
    found = []
    for index, message in enumerate(messages):
        if not thought_of(message):
            found.append(message)
        elif thinking == "keep" or (thinking == "last" and index > asked):
            found.append(message if reads else _inside(message))
        else:
            found.append(_checked(without_thought(message), thinking, where))
    return found


def check_thoughts(dialogue: Dialogue, text: str, write: Callable[[Dialogue], str], learned: Sequence[int]) -> None:
    """Refuse to lose reasoning that is to be learned: without it, the row would be written no otherwise.

    Args:
        dialogue: what was written.
        text: as what.
        write: writes another dialogue in the same way.
        learned: the places of the turns to learn.

    Raises:
        LuthierError: the reasoning of such a turn is not in the text; the error shows it.
    """
    asked = _asked(dialogue.messages)
    for index in learned:
        thought = thought_of(dialogue.messages[index])
        if not thought:
            continue
        rest = [*dialogue.messages[:index], without_thought(dialogue.messages[index]), *dialogue.messages[index + 1 :]]
        if write(replace(dialogue, messages=rest)) != text:
            continue
        earlier = ["write that of the last turn alone (rows.thinking: last)", "learn the last turn alone (rows.loss_on: last)"]
        ways = [
            "leave out all of it (rows.thinking: drop)",
            "or name a chat template that writes it (rows.chat_template: FILE.jinja)",
        ]
        raise LuthierError(
            f"the chat template deletes the reasoning of an assistant's turn to learn: {_shortened(thought)!r}",
            where=dialogue.where,
            fix=", ".join([*(earlier if index < asked else []), *ways]),
        )


def altered(dialogue: Dialogue, index: int, turn: tuple[int, int], text: str, end: str) -> bool:
    """Whether the words of a turn to learn are written otherwise.

    Args:
        dialogue: what was written.
        index: the turn's place.
        turn: its first character in the text, and the one behind its last.
        text: what was written.
        end: what ends a turn.

    Raises:
        LuthierError: some of them are missing from it, with nothing in their place; the error shows them.
    """
    message = dialogue.messages[index]
    whole = message["content"].strip()
    # A template whose generation prompt begins the answer writes the first words in front of the turn.
    before, written = text[max(0, turn[0] - len(whole)) : turn[0]], text[turn[0] : turn[1]].removesuffix(end)
    if all(part in before + written for part in (thought_of(message), without_thought(message)["content"].strip())):
        return False
    said, lead = list(_WORD.finditer(whole)), _WORD.findall(before)
    changes = difflib.SequenceMatcher(
        None, [one[0] for one in said], [*lead, *_WORD.findall(written)], autojunk=False
    ).get_opcodes()
    # What stands in the turn in the place of words is another writing of them; what stands in front of it is the template's.
    missing = [
        whole[said[first].start() : said[behind - 1].end()]
        for kind, first, behind, begin, stop in changes
        if kind in ("delete", "replace") and stop <= max(begin, len(lead))
    ]
    if missing:
        raise LuthierError(
            f"the chat template deletes text of an assistant's turn to learn: {_shortened(missing[0])!r}",
            where=dialogue.where,
            fix="name a chat template that writes it (rows.chat_template: FILE.jinja), or mark the turn with `learn: false`",
        )
    return True


def _asked(messages: Sequence[Message]) -> int:
    """The place of the last message of a user; -1 where there is none."""
    return max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _parted(content: str) -> tuple[str, str]:
    """Reasoning at the beginning of a content, and the words behind it."""
    within = content.lstrip()
    if not within.startswith(_OPEN) or _CLOSE not in within:
        return "", content
    thought, _, words = within.removeprefix(_OPEN).partition(_CLOSE)
    return (thought.strip(), words.lstrip()) if thought.strip() else ("", content)


def _inside(message: Message) -> Message:
    """A message whose reasoning is text."""
    if _parted(message["content"])[0]:
        return message
    rest = {key: part for key, part in message.items() if key not in FIELDS}
    return {**rest, "content": f"{_OPEN}\n{thought_of(message)}\n{_CLOSE}\n\n{message['content']}"}


def _checked(message: Message, thinking: Thinking, where: str) -> Message:
    if not message["content"].strip() and not message.get("tool_calls"):
        raise LuthierError(
            f"an assistant says nothing but its reasoning, which rows.thinking: {thinking} leaves out",
            where=where,
            fix="fix this row, or use rows.thinking: keep",
        )
    return message
