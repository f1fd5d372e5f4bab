"""A row as one plain text: for what compares texts, not for what a model is trained on (`luthier.rows.chat`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from luthier.rows.ids import canonical
from luthier.rows.messages import Message
from luthier.rows.shapes import Row


def text_of(row: Row) -> str:
    """All that a row says, without roles and templates, its pieces on lines of their own.

    Of answers that are compared it is the best one, of several accepted ones the first, of choices the right one. A label is no part of
    the text, nor are tools that are merely offered.
    """
    return "\n".join(piece for piece in _PIECES[row.shape](row.fields) if piece)


def _said(value: str | list[Message]) -> list[str]:
    if isinstance(value, str):
        return [value]
    called = [canonical(message["tool_calls"]) if message.get("tool_calls") else "" for message in value]
    return [piece for message, call in zip(value, called, strict=True) for piece in (message["content"], call)]


_PIECES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "messages": lambda fields: _said(fields["messages"]),
    "prompt+completion": lambda fields: [*_said(fields["prompt"]), *_said(fields["completion"])],
    "instruction": lambda fields: [fields["instruction"], fields["input"], fields["output"]],
    "text": lambda fields: [fields["text"]],
    "text+label": lambda fields: [fields["text"]],
    "text+tags": lambda fields: [fields["text"]],
    "prompt+chosen+rejected": lambda fields: [*_said(fields["prompt"]), *_said(fields["chosen"])],
    "prompt+answers+scores": lambda fields: [
        *_said(fields["prompt"]),
        *_said(fields["answers"][fields["scores"].index(max(fields["scores"]))]),
    ],
    "prompt+answer": lambda fields: [*_said(fields["prompt"]), fields["answer"][0]],
    "prompt+choices+answer": lambda fields: [*_said(fields["prompt"]), fields["choices"][fields["answer"]]],
    "prompt": lambda fields: _said(fields["prompt"]),
    "members": lambda fields: [piece for row in fields["members"] for piece in _PIECES[row.shape](row.fields)],
}
