"""TL-Training (Ye et al., 2024), section 4.1: calls that a tool answers with an error are read and not learned."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from luthier.errors import LuthierError
from luthier.kinds import RowMap, Services
from luthier.registry import method
from luthier.rows.messages import Message
from luthier.rows.shapes import Row

MARKERS = (
    "is not defined",
    "positional argument",
    "unexpected keyword",
    "connection error",
    "not supported",
    "invalid API call",
    "response error",
    "400 client error",
)
FAILED = ("error", "errors", "failed", "failure")
WENT_WELL = ("ok", "okay", "success", "successful", "succeeded", "completed")


@method(
    title="TL-Training, failed calls as context",
    paper="arXiv:2412.15495",
    row=16,
    reduces_to="no reply reports an error and every call is answered: the same rows",
    departs="the paper cuts a conversation into one row for each turn, here it stays one row, which a causal model learns alike where the "
    "chat template writes earlier turns as at inference; where a reply says itself whether it failed, that decides, and the code's marker "
    "`error`, which also hits `no errors found`, is left out with those of single tools; any failed reply to parallel calls counts; the "
    "code also drops turns in mid-conversation that call no tool, which are learned here",
)
def failed_calls(*, markers: tuple[str, ...] = MARKERS) -> RowMap:
    """Make assistant turns context only where the tool's reply reports an error, so that a model learns to recover and not to fail.

    A message with `tool_calls` to which no tool replies is context only, too. The last message is always learned. A reply fails where
    it, as a message or as a JSON object, says so by `is_error`, `error` or `status`; where it has none of these, a marker in its text
    decides.

    Args:
        markers: texts by which a reply reports an error; letters and digits are compared, in lower case. The general ones of the
            authors' code.

    Raises:
        LuthierError: a marker has neither letters nor digits.
    """
    for marker in markers:
        if not _bare(marker):
            raise LuthierError(f"the marker {marker!r} has no letter", where="failed_calls: markers", fix="leave it out")
    bare = tuple(map(_bare, markers))

    def failed(reply: Message) -> bool:
        said = [one for body in (reply, _object(reply["content"])) for one in _verdicts(body)]
        return any(said) if said else any(marker in _bare(reply["content"]) for marker in bare)

    def map_rows(rows: Sequence[Row], services: Services) -> list[Row]:
        return [_marked(row, failed) for row in rows]

    return RowMap(map_rows, _told)


def _marked(row: Row, failed: Callable[[Message], bool]) -> Row:
    key = "messages" if row.shape == "messages" else "completion"
    messages = row.fields.get(key)
    if not isinstance(messages, list):
        return row
    marked = []
    for place, message in enumerate(messages[:-1]):
        replies = list(takewhile(lambda one: one["role"] == "tool", messages[place + 1 :]))
        unanswered = bool(message.get("tool_calls")) and not replies
        fails = message["role"] == "assistant" and (unanswered or any(map(failed, replies)))
        marked.append({**message, "learn": False} if fails else message)
    return replace(row, fields={**row.fields, key: [*marked, messages[-1]]})


def _told(before: Sequence[Row], after: Sequence[Row]) -> str:
    """How many turns became context only."""

    def context(row: Row) -> int:
        spoken = (row.fields.get("messages"), row.fields.get("completion"))
        return sum(one.get("learn") is False for messages in spoken if isinstance(messages, list) for one in messages)

    added = [context(new) - context(old) for old, new in zip(before, after, strict=True)]
    return f"{sum(added)} assistant turns in {sum(map(bool, added))} of {len(after)} rows are context only"


def _bare(text: str) -> str:
    return "".join(sign for sign in text.lower() if sign.isalnum())


def _object(content: str) -> Mapping[str, Any]:
    """A reply that is an object, as JSON or as Python writes it."""
    if not content.lstrip().startswith("{"):
        return {}
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(content.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, Mapping):
            return found
    return {}


def _is_true(value: Any) -> bool:
    return _bare(value) not in ("", "false", "no", "none", "null") if isinstance(value, str) else bool(value)


def _verdicts(body: Mapping[str, Any]) -> list[bool]:
    """What `is_error`, `error` and `status` say: True where they report an error; nothing where they say neither."""
    said = [_is_true(body[key]) for key in ("is_error", "error") if key in body]
    status = body.get("status")
    if isinstance(status, bool):
        return [*said, not status]
    if isinstance(status, int):
        return [*said, status >= 400]
    word = _bare(status) if isinstance(status, str) else ""
    return [*said, word in FAILED] if word in (*FAILED, *WENT_WELL) else said
