"""What stands beside a row's own keys: context that belongs into its text, and keys that are no part of it.

| key beside a shape | what is made of it |
|---|---|
| `system`, `system_prompt` | the system message before all others |
| `history` beside a `prompt` or `question` | earlier turns of the prompt: context only |
| `history` beside `instruction` | earlier turns of a conversation, learned as `rows.loss_on` says, as LLaMA-Factory and ms-swift do |
| `loss_mask` beside a conversation | a mark for each message, 0 where it is context only |
| `tools`, `documents`, `chat_template_kwargs` | given to the chat template |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import LuthierError
from luthier.rows.messages import Message, checked_messages, checked_text, checked_tools, from_json_list, kind_of

OF_TEMPLATES = ("tools", "documents", "chat_template_kwargs")
OF_CONVERSATIONS = ("system", "system_prompt", "loss_mask", *OF_TEMPLATES)
OF_PROMPTS = ("system", "system_prompt", "history", *OF_TEMPLATES)

# Other tools make text of these, or of what they point to.
_READ_ELSEWHERE = frozenset(
    {
        "system",
        "system_prompt",
        "history",
        "tools",
        "functions",
        "documents",
        "context",
        "contexts",
        "passage",
        "passages",
        "background",
        "knowledge",
        "persona",
        "input",
        "query",
        "response",
        "instruction",
        "question",
        "prompt",
        "completion",
        "output",
        "answer",
        "answers",
        "messages",
        "conversations",
        "chosen",
        "rejected",
        "chosen_response",
        "rejected_response",
        "rejected_messages",
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "audios",
        "objects",
        "reasoning",
        "reasoning_content",
        "thinking",
        "thought",
        "cot",
        "chain_of_thought",
        "function_call",
        "tool_calls",
        "loss_mask",
        "chat_template_kwargs",
    }
)
_ABOUT_THE_ROW = ("meta", "metadata")
_RUNNING_TEXT = 3
"""Words: a text of fewer names something, such as a source or a topic."""
_SET_HERE = ("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")
_VERDICTS = ("label", "kto_tag")
_ANSWERED = ("messages", "prompt+completion", "instruction")


def context_of(record: Mapping[str, Any], shape: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A row's shape and fields with the context that stands beside them.

    Args:
        record: all keys.
        shape: what the shape became.
        fields: its values, checked.

    Raises:
        LuthierError: the context is of the wrong type, or says otherwise than the row's messages.
    """
    fields = {**fields, **_for_template(record)}
    system, history = _system(record), [] if shape == "messages" else _history(record)
    if shape == "messages":
        return shape, {**fields, "messages": _behind(system, fields["messages"])}
    if not system and not history:
        return shape, fields
    if shape == "instruction":
        answered = [{"role": "user", "content": asked(fields)}, {"role": "assistant", "content": fields["output"]}]
        rest = {key: value for key, value in fields.items() if key not in ("instruction", "input", "output")}
        return "messages", {**rest, "messages": _behind(system, [*history, *answered])}
    prompt = fields["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return shape, {**fields, "prompt": _behind(system, [*history, *turns])}


def asked(fields: Mapping[str, Any]) -> str:
    """What an instruction asks, with its input."""
    return "\n\n".join(part for part in (fields["instruction"], fields["input"]) if part.strip())


def unread(own: Sequence[str] | frozenset[str], fields: Mapping[str, Any], columns: Mapping[str, Any]) -> list[str]:
    """The keys of a row that hold text or more and are no part of what a model reads.

    Numbers and names, such as a source or a topic, are columns that techniques read.

    Args:
        own: the keys that the row's shape reads.
        fields, columns: the row's.
    """
    found = {**fields, **columns}
    return [key for key, value in found.items() if key not in own and key not in _ABOUT_THE_ROW and _speaks(key, value)]


def disliked(shape: str, columns: Mapping[str, Any]) -> str | None:
    """The key by which a row says that its answer is a bad one."""
    said = (key for key in _VERDICTS if shape in _ANSWERED and str(columns.get(key)).strip().lower() in ("0", "false"))
    return next(said, None)


def _speaks(key: str, value: Any) -> bool:
    if key in _READ_ELSEWHERE and not isinstance(value, bool | int | float):
        return bool(value)
    if isinstance(value, str):
        return len(value.split()) >= _RUNNING_TEXT
    return isinstance(value, Mapping | list | tuple) and _holds_text(value)


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_text, value.values()))
    return any(map(_holds_text, value)) if isinstance(value, list | tuple) else isinstance(value, str)


def _for_template(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if tools := checked_tools(record.get("tools")):
        found["tools"] = tools
    documents = from_json_list(record.get("documents"))
    if documents:
        if not isinstance(documents, list | tuple) or not all(isinstance(one, Mapping) for one in documents):
            raise LuthierError("`documents` must be a list of objects", fix='such as [{"title": ..., "text": ...}]')
        found["documents"] = [dict(one) for one in documents]
    options = record.get("chat_template_kwargs")
    if options:
        if not isinstance(options, Mapping):
            raise LuthierError(f"`chat_template_kwargs` must be an object, not {kind_of(options)}")
        taken = [key for key in options if key in (*_SET_HERE, *OF_TEMPLATES) or key.startswith("return_")]
        if taken:
            raise LuthierError(f"`chat_template_kwargs` sets `{taken[0]}`, which is set here", fix="remove it")
        found["chat_template_kwargs"] = dict(options)
    return found


def _system(record: Mapping[str, Any]) -> list[Message]:
    given = {key: record[key] for key in ("system", "system_prompt") if record.get(key)}
    texts = [checked_text(value, key) for key, value in given.items()]
    if len(set(texts)) > 1:
        raise LuthierError("`system` and `system_prompt` differ", fix="keep one of them")
    return [{"role": "system", "content": texts[0]}] if texts else []


def _history(record: Mapping[str, Any]) -> list[Message]:
    turns = from_json_list(record.get("history"))
    if not turns:
        return []
    if isinstance(turns, list | tuple) and all(isinstance(turn, Mapping) for turn in turns):
        return checked_messages(turns, "history")
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise LuthierError("`history` must be a list of pairs, a question and its answer, or of messages {role, content}")
    roles = ("user", "assistant")
    return checked_messages(
        [{"role": role, "content": said} for turn in turns for role, said in zip(roles, turn, strict=True)], "history"
    )


def _behind(system: list[Message], messages: list[Message]) -> list[Message]:
    if not system or messages[0]["role"] not in ("system", "developer"):
        return [*system, *messages]
    if messages[0]["content"] != system[0]["content"]:
        raise LuthierError(
            "the row has two system texts: one beside its messages, and one as the first of them", fix="keep one of them"
        )
    return messages
