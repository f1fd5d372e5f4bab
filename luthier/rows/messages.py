"""What a message is: who speaks, its words, its calls, and whether it is learned, in the spellings of several tools.

| key of a message | what is made of it |
|---|---|
| `learn` | ours: `false` makes the turn context only |
| `weight` (OpenAI, Mistral), `loss`, `loss_scale` (ms-swift) | read as `learn` |
| `train`, `training` (axolotl), `trainable`, `loss_mask` (verl) | read as `learn` |
| `masked` (torchtune) | read as `learn`, turned round |
| a turn `from: function_call` (LLaMA-Factory) | an assistant's turn with the calls that its value holds |
| `arguments` of a call, as JSON text (OpenAI) | the object that the text writes |
| all others | given to the chat template as they are |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import LuthierError, nearest

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_CALLS = "function_call"
_LEARN = "learn"
_MARKS = (_LEARN, "weight", "loss", "loss_scale", "loss_mask", "train", "training", "trainable", "masked")
_INVERTED = "masked"
# Whatever these say, their tools learn nothing but an assistant's turns; the other marks would have a user's learned, too.
_OF_ANY_ROLE = ("weight", "loss", "loss_scale")
_PARTS_OF_A_TURN = "train_detail"


def checked_messages(value: Any, key: str) -> list[Message]:
    """A list of messages, each with its role and its content as text.

    Args:
        value: a list of `{role, content}`, or the JSON text of one.
        key: where it stands, for error messages.

    Raises:
        LuthierError: it is no such list, or a message in it cannot be used.
    """
    given = from_json_list(value)
    if isinstance(given, list | tuple):
        # Turns of ShareGPT stand wherever messages do.
        given = [_of_turn(one, f"{key}[{index}]") if is_message(one) else one for index, one in enumerate(given)]
    if not isinstance(given, list | tuple):
        raise LuthierError(f"`{key}` must be a list of messages {{role, content}}, not {kind_of(value)}")
    if not given:
        raise LuthierError(f"`{key}` is empty")
    return [_message(message, f"{key}[{index}]") for index, message in enumerate(given)]


def sharegpt_messages(value: Any, key: str) -> list[Any]:
    """Turns `{from, value}` as messages, not yet checked; those that are messages already stay as they are.

    Raises:
        LuthierError: it is no such list, or a turn is from an unknown role.
    """
    turns = from_json_list(value)
    if not isinstance(turns, list | tuple):
        raise LuthierError(f"`{key}` must be a list of {{from, value}}, not {kind_of(value)}")
    for index, turn in enumerate(turns):
        if not is_message(turn):
            raise LuthierError(f"`{key}[{index}]` must be an object {{from, value}}")
    return [_of_turn(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]


def is_message(value: Any) -> bool:
    """Whether a value has the keys of a message, or of a turn of ShareGPT."""
    return isinstance(value, Mapping) and any(keys <= set(value) for keys in ({"role", "content"}, {"from", "value"}))


def with_marks(messages: Sequence[Any], marks: Any, key: str) -> list[Any]:
    """Messages, not yet checked, each with its mark out of a list that stands beside them.

    Args:
        messages: the messages.
        marks: one for each message, 1 or true where it is learned; for turns that are not an assistant's they say nothing.
        key: where the marks stand, for error messages.

    Raises:
        LuthierError: there are not as many marks as messages.
    """
    listed = from_json_list(marks)
    if not isinstance(listed, list | tuple) or len(listed) != len(messages):
        count = f"{len(listed)} marks" if isinstance(listed, list | tuple) else kind_of(marks)
        raise LuthierError(
            f"`{key}` must have one mark for each of the {len(messages)} messages, and is {count}",
            fix="mark the turns themselves, with `learn: false`",
        )
    spoken = [isinstance(one, Mapping) and one.get("role") == "assistant" for one in messages]
    return [
        {**one, "loss_mask": mark} if mine and mark is not None else one
        for one, mark, mine in zip(messages, listed, spoken, strict=True)
    ]


def without_mark(message: Message) -> Message:
    """A message as a chat template is given it: whether it is learned is no part of what is said."""
    return {name: part for name, part in message.items() if name != _LEARN}


def with_written_arguments(message: Message) -> Message:
    """A message whose calls have their arguments as JSON text, for chat templates that expect them so."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_arguments(call, _as_text) for call in message["tool_calls"]]}


def arguments_of(message: Message) -> list[Any]:
    """The arguments of a message's calls: objects, or text that is the JSON of none."""
    bodies = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return [body.get("arguments") for body in bodies if isinstance(body, Mapping)]


def checked_tools(value: Any) -> list[dict[str, Any]]:
    """The tools a row offers; none where the value holds nothing.

    Raises:
        LuthierError: it is no list of objects, nor the JSON text of one.
    """
    given = value
    if isinstance(value, str):
        try:
            given = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as problem:
            raise LuthierError(f"`tools` is text but not JSON: {problem}") from None
    tools = [_as_object(tool) for tool in given] if isinstance(given, list | tuple) else given
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise LuthierError(
            "`tools` must be a list of objects",
            fix='fix this row: describe each tool, such as [{"type": "function", "function": {"name": ..., "parameters": ...}}]',
        )
    return [dict(tool) for tool in tools]


def checked_text(value: Any, key: str) -> str:
    """Text that says something.

    Raises:
        LuthierError: it is no text, or an empty one.
    """
    if not isinstance(value, str):
        raise LuthierError(f"`{key}` must be text, not {kind_of(value)}")
    if not value.strip():
        raise LuthierError(f"`{key}` is empty" + (" but for white space, which is no answer to learn" if value else ""))
    return value


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {type(None): "null", dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def from_json_list(value: Any) -> Any:
    """The list that a text writes as JSON, as columns without nested types hold it; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _of_turn(turn: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A turn `{from, value}` as a message, not yet checked; a message stays as it is."""
    if not {"from", "value"} <= set(turn) or "role" in turn:
        return turn
    speaker = str(turn["from"])
    if speaker not in SHAREGPT_ROLES:
        raise LuthierError(f"`{key}` is from the unknown role {speaker!r}", fix=nearest(speaker, SHAREGPT_ROLES))
    others = {name: part for name, part in turn.items() if name not in ("from", "value")}
    if speaker == _CALLS:
        return {**others, "role": "assistant", "content": "", "tool_calls": _called(turn["value"], key)}
    return {**others, "role": SHAREGPT_ROLES[speaker], "content": turn["value"]}


def _called(value: Any, key: str) -> list[dict[str, Any]]:
    """The calls that a turn of LLaMA-Factory holds as JSON: one, or a list of them."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as problem:
        raise LuthierError(f"`{key}` is a call, but not JSON: {problem}") from None
    calls = given if isinstance(given, list) else [given]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise LuthierError(f"`{key}` is a call without a `name`", fix='write {"name": ..., "arguments": {...}}, or a list of these')
    return [{"type": "function", "function": dict(call)} for call in calls]


def _message(value: Any, key: str) -> Message:
    if not isinstance(value, Mapping):
        raise LuthierError(f"`{key}` must be an object {{role, content}}, not {kind_of(value)}")
    # Many files give every message every key, with null where a message had none.
    message = {name: part for name, part in value.items() if part is not None}
    role = message.get("role")
    if role not in ROLES:
        offer = nearest(str(role), ROLES)
        raise LuthierError(f"`{key}` has the unknown role {role!r}", fix=offer or "known: " + ", ".join(ROLES))
    message = _marked(message, key)
    if role == "assistant" and isinstance(message.get("function_call"), Mapping) and "tool_calls" not in message:
        # As OpenAI's interface wrote a call before there could be several.
        message = {**message, "tool_calls": [{"type": "function", "function": dict(message["function_call"])}]}
        del message["function_call"]
    content = message.get("content")
    calls = _calls(message.get("tool_calls"), f"{key}.tool_calls")
    if calls:
        message = {**message, "tool_calls": calls}
    if role == "assistant" and calls and content in (None, ""):
        return {**message, "content": ""}
    if "content" not in value:
        raise LuthierError(f"`{key}` has no `content`")
    if isinstance(content, list | tuple):
        content = _joined_parts(content, f"{key}.content")
    if role in ("system", "developer", "tool") and content == "":
        return {**message, "content": ""}
    return {**message, "content": checked_text(content, f"{key}.content")}


def _marked(message: Message, key: str) -> Message:
    """The message with at most our own mark, whatever marks it came with."""
    said = {name: _truth(message[name], name, key) for name in _MARKS if name in message}
    if message.get(_PARTS_OF_A_TURN):
        raise LuthierError(f"`{key}.{_PARTS_OF_A_TURN}` marks parts of a turn", fix="learn the turn, or write `learn: false`")
    if message["role"] != "assistant":
        said = {name: learn for name, learn in said.items() if not (learn and name in _OF_ANY_ROLE)}
    others = {name: part for name, part in message.items() if name not in _MARKS and name != _PARTS_OF_A_TURN}
    if not said:
        return others
    yes, no = ([name for name, learn in said.items() if learn is one] for one in (True, False))
    if yes and no:
        raise LuthierError(
            f"`{key}` is to be learned by its `{yes[0]}`, and not by its `{no[0]}`", fix="keep one, or write `learn`"
        )
    if yes and message["role"] != "assistant":
        mark = f"{yes[0]}: {json.dumps(message[yes[0]])}"
        raise LuthierError(
            f"`{key}` is the turn of a {message['role']} and says `{mark}`",
            fix="only an assistant's turns are learned: remove the key, or learn all text with loss_on: all",
        )
    return {**others, _LEARN: bool(yes)}


def _truth(value: Any, name: str, key: str) -> bool:
    if not isinstance(value, bool) and (name == _LEARN or not isinstance(value, int | float) or value not in (0, 1)):
        number = isinstance(value, int | float) and name != _LEARN
        what = f"is {value}: a turn is learned or not" if number else f"must be true or false, not {kind_of(value)}"
        raise LuthierError(f"`{key}.{name}` {what}", fix="write `learn: false` for a turn that is context only")
    return bool(value) != (name == _INVERTED)


def _calls(value: Any, key: str) -> list[dict[str, Any]]:
    calls = from_json_list(value) or []
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise LuthierError(f"`{key}` must be a list of objects")
    return [_with_arguments(call, _as_object) for call in calls]


def _with_arguments(call: Mapping[str, Any], change: Any) -> dict[str, Any]:
    body = call.get("function", call)
    if not isinstance(body, Mapping):
        return dict(call)
    # A call of a function that takes nothing is often written without any.
    changed = {**body, "arguments": change(body.get("arguments", {}))}
    return {**call, "function": changed} if "function" in call else changed


def _as_object(value: Any) -> Any:
    """The object that a text writes as JSON; an empty text is an empty one. Any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict) else value


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _joined_parts(parts: Sequence[Any], key: str) -> str:
    for part in parts:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise LuthierError(f"`{key}` holds a part that is not text; only text can be learned from")
    return "".join(part["text"] for part in parts)
