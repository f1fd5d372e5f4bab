"""Two answers to one prompt or more, in the forms in which they are kept: what both dialogues begin with is the prompt.

| keys | the prompt |
|---|---|
| `prompt`, `chosen`, `rejected` | `prompt`; answers that repeat it lose it |
| `conversations`, `chosen`, `rejected` | `conversations`, in ShareGPT's spelling; each answer is one message or more |
| `chosen`, `rejected` | the messages with which both begin; of texts `Human: ... Assistant: ...` too, of other texts what both begin with |
| `prompt`, `answers`, `scores` | `prompt`; of any number of answers, each with its score |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from luthier.errors import LuthierError
from luthier.rows.messages import (
    Message,
    checked_messages,
    checked_text,
    from_json_list,
    is_message,
    kind_of,
    sharegpt_messages,
    without_mark,
)

SIDES = ("chosen", "rejected")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")


def text_or_messages(value: Any, key: str) -> str | list[Message]:
    """Text, or checked messages.

    Raises:
        LuthierError: it is neither, or empty.
    """
    # Other tools write an answer that is one message without a list around it.
    messages = [value] if is_message(value) else value
    return checked_messages(messages, key) if isinstance(messages, list | tuple) else checked_text(value, key)


def completion_of(value: Any, key: str, prompt: str | list[Message]) -> str | list[Message]:
    """The completion alone: files that repeat the prompt at the start of it would otherwise have it learned twice.

    Raises:
        LuthierError: it begins with neither an assistant's message nor the prompt.
    """
    completion = text_or_messages(value, key)
    if isinstance(completion, str):
        return completion
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    same = _alike(completion, asked)
    if same == len(asked):
        completion = completion[same:]
    elif same or (completion and completion[0]["role"] != "assistant"):
        here = completion[same] if same < len(completion) else {"role": "nobody", "content": ""}
        raise LuthierError(
            f"`{key}` begins with another prompt than `prompt`: its message {same + 1} is {_shown(here)}, and the prompt's is "
            f"{_shown(asked[same])}",
            fix=f"leave the prompt out of `{key}`, which must begin with an assistant message, or write it as in `prompt`",
        )
    if not completion or completion[0]["role"] != "assistant":
        raise LuthierError(f"`{key}` must begin with an assistant message, or with the messages of `prompt` and then one")
    return completion


def prompted(record: Mapping[str, Any], *completions: str) -> dict[str, Any]:
    """The fields of a row with a prompt and as many completions."""
    prompt = text_or_messages(record["prompt"], "prompt")
    return {"prompt": prompt, **{key: completion_of(record[key], key, prompt) for key in completions}}


def graded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row with any number of answers to its prompt, and a score of each; more is better.

    Raises:
        LuthierError: answers or scores are no list, there are unequally many, or a score is no finite number.
    """
    prompt = text_or_messages(record["prompt"], "prompt")
    answers, scores = (from_json_list(record[key]) for key in ("answers", "scores"))
    for key, value in (("answers", answers), ("scores", scores)):
        if not isinstance(value, list | tuple) or not value:
            what = "`{key}` is empty" if isinstance(value, list | tuple) else f"`{{key}}` must be a list, not {kind_of(value)}"
            raise LuthierError(what.format(key=key), fix="give as many scores as answers, one or more")
    if len(answers) != len(scores):
        raise LuthierError(f"the row has {len(answers)} answers and {len(scores)} scores", fix="give each answer one score")
    for place, score in enumerate(scores):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise LuthierError(f"`scores[{place}]` is {score!r}, which is no number", fix="give a number, or leave that answer out")
    said = [completion_of(answer, f"answers[{place}]", prompt) for place, answer in enumerate(answers)]
    return {"prompt": prompt, "answers": said, "scores": [float(score) for score in scores]}


def of_conversation(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row whose prompt stands under `conversations`."""
    prompt = checked_messages(sharegpt_messages(record["conversations"], "conversations"), "conversations")
    return {"prompt": prompt, **{key: completion_of(record[key], key, prompt) for key in SIDES}}


def of_dialogues(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row of two whole dialogues.

    Raises:
        LuthierError: they begin differently, or differ first in what is no assistant's message.
    """
    chosen, rejected = (_dialogue(record[key], key) for key in SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _texts(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise LuthierError("of `chosen` and `rejected` one is text and the other messages", fix="write both alike")
    # Dialogues that are the same throughout still have an answer at the end.
    same = min(_alike(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if same < 1:
        raise LuthierError(
            f"`chosen` and `rejected` have no prompt in common: one begins with {_shown(chosen[0])}, the other with "
            f"{_shown(rejected[0])}",
            fix="add a `prompt`, or begin both with the same messages",
        )
    for key, messages in zip(SIDES, (chosen, rejected), strict=True):
        if messages[same]["role"] != "assistant":
            raise LuthierError(
                f"`chosen` and `rejected` differ first in message {same + 1}, and in `{key}` that is {_shown(messages[same])}, no answer",
                fix="let them differ in an assistant message alone, or add a `prompt`",
            )
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _dialogue(value: Any, key: str) -> str | list[Message]:
    found = text_or_messages(value, key)
    if not isinstance(found, str) or _TURN.match(found) is None:
        return found
    pieces = _TURN.split(found)[1:]
    turns = [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    return checked_messages(turns, key)


def _texts(chosen: str, rejected: str) -> dict[str, Any]:
    shared = "".join(one for one, _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    # No word is cut: both may go on with the same letters by chance.
    shared = shared[: max((place + 1 for place, one in enumerate(shared) if one.isspace()), default=0)]
    answers = [one[len(shared) :] for one in (chosen, rejected)]
    if not shared.strip() or not all(one.strip() for one in answers):
        raise LuthierError(
            "`chosen` and `rejected` have no prompt in common, or no answer behind it",
            fix="add a `prompt`, and leave the answers alone in `chosen` and `rejected`",
        )
    return {"prompt": shared, **dict(zip(SIDES, answers, strict=True))}


def _alike(left: Sequence[Message], right: Sequence[Message]) -> int:
    """With how many equal messages both begin."""
    pairs = zip(map(without_mark, left), map(without_mark, right), strict=False)
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], pairs))


def _shown(message: Message) -> str:
    content = str(message.get("content") or "").replace("\n", " ")
    return f"{message['role']}: `{content[:40]}{'…' if len(content) > 40 else ''}`"
