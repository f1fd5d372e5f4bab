"""Questions that a model should answer by calling functions, with all arguments that are right: rows of the Berkeley Function-Calling
Leaderboard (Patil et al., 2025), and how an answer to one is judged.

What is right is written as there: a list of calls, `{NAME: {ARGUMENT: [VALUE, ...]}}` each, where every value listed is right and `""`
among them says that the argument may be left out; an empty list where no function should be called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.errors import LuthierError
from luthier.rows.answers import strict_json
from luthier.rows.preferences import text_or_messages

Call = tuple[str, Mapping[str, Any]]
"""A function's name and its arguments."""
LEFT_OUT = ""
"""Among the values of an argument: it need not be there."""
_TAGS = re.compile(r"</?tool_call>")
_SIGNS = re.compile(r"[\s,./\-_*^]")
"""What texts may differ in, as on the leaderboard."""
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
"""Types of Python that the leaderboard's functions have, as JSON Schema calls them."""
_ARGUMENTS = ("arguments", "parameters")


def of_leaderboard(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the leaderboard's: its turn is the prompt and its functions are the tools. Two answers are accepted: calls with the first of
    all right values, as a model may write them, which is what would be learned, and all that is right.

    Raises:
        LuthierError: it has several turns, which are no one question, or a value is not as it is there.
    """
    turns, functions, right = record["question"], record["function"], record["ground_truth"]
    if isinstance(turns, list) and len(turns) > 1 and all(isinstance(one, list) for one in turns):
        raise LuthierError(
            f"the row asks in {len(turns)} turns", fix="keep rows of one turn: each answer would be part of the next question"
        )
    turn = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], list) else turns
    listed = [functions] if isinstance(functions, Mapping) else functions
    if not isinstance(listed, list) or not all(isinstance(one, Mapping) for one in listed):
        raise LuthierError("`function` must be a list of functions", fix='write [{"name": ..., "parameters": ...}]')
    answer = json.dumps(right, ensure_ascii=False)
    calls = _expected(answer)
    if calls is None:
        raise LuthierError("`ground_truth` is no list of calls", fix='write [{"NAME": {"ARGUMENT": [VALUE, ...]}}]')
    written = [json.dumps({"name": name, "arguments": _firsts(values)}, ensure_ascii=False) for name, values in calls]
    tools = [{"type": "function", "function": _with_types(one)} for one in listed]
    return {
        "prompt": text_or_messages(turn, "question"),
        "tools": tools,
        "answer": list(dict.fromkeys(["\n".join(written) or answer, answer])),
    }


def _firsts(right: Mapping[str, Any]) -> dict[str, Any]:
    """The first right value of each argument, of those that have to be there."""
    firsts = {key: (values[0] if values else []) if isinstance(values, list) else values for key, values in right.items()}
    return {key: _plain_value(one) for key, one in firsts.items() if one != LEFT_OUT}


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _firsts(value)
    return [_plain_value(one) for one in value] if isinstance(value, list) else value


def _with_types(value: Any) -> Any:
    """A function's description with types as JSON Schema calls them; one of any type says none."""
    if isinstance(value, Mapping):
        kept = {key: one for key, one in value.items() if (key, one) != ("type", "any")}
        return {
            key: _TYPES.get(one, one) if key == "type" and isinstance(one, str) else _with_types(one) for key, one in kept.items()
        }
    return [_with_types(one) for one in value] if isinstance(value, list) else value


def tool_calls(answer: str, accepted: Sequence[str]) -> float:
    """1 where an answer's calls are the expected ones, in any order, each argument one of the values that are right, else 0.

    A call is JSON, an object of `name` and `arguments` (or `parameters`); several stand in a list, behind each other, or in
    `<tool_call>` tags, with nothing beside them; an accepted answer is written so as well, or lists all right values. Texts may differ in
    case, spaces and the signs `, . / - _ * ^`, lists may not be in another order, 3 and 3.0 are the same number, and neither is "3" or
    true. Where no call is expected, an answer without one is right.
    """
    calls = calls_of(answer) or []
    return float(any(_are(calls, expected) for one in accepted if (expected := _expected(one)) is not None))


def calls_of(text: str) -> list[Call] | None:
    """The calls in an answer, none of them in an empty list; None where it is anything else."""
    rest, found = _TAGS.sub(" ", text).strip(), []
    decoder = json.JSONDecoder()
    try:
        while rest:
            _, end = decoder.raw_decode(rest)
            value = strict_json(rest[:end])
            found += value if isinstance(value, list) else [value]
            rest = rest[end:].lstrip()
    # Also a number of thousands of digits, or brackets a thousand deep.
    except (ValueError, RecursionError):
        return None
    calls = [_call(one) for one in found]
    return [one for one in calls if one is not None] if None not in calls else None


def _call(value: Any) -> Call | None:
    key = next((one for one in _ARGUMENTS if isinstance(value, dict) and set(value) == {"name", one}), None)
    if key is None or not isinstance(value["name"], str) or not isinstance(value[key], dict):
        return None
    return value["name"], value[key]


def can_match(accepted: str) -> bool:
    """Whether a text says which calls are right."""
    return bool(accepted.strip()) and _expected(accepted) is not None


def _expected(text: str) -> list[Call] | None:
    written = calls_of(text)
    if written is not None:
        return [(name, {key: [_alone(value)] for key, value in given.items()}) for name, given in written]
    try:
        calls = strict_json(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(calls, list) or not all(isinstance(one, dict) and len(one) == 1 for one in calls):
        return None
    found: list[Call] = [(name, values) for one in calls for name, values in one.items()]
    whole = all(isinstance(some, dict) and all(isinstance(one, list) for one in some.values()) for _, some in found)
    return found if whole else None


def _alone(value: Any) -> Any:
    """A value as one that alone is right."""
    if isinstance(value, dict):
        return {key: [_alone(one)] for key, one in value.items()}
    return [_alone(one) for one in value] if isinstance(value, list) else value


def _are(calls: Sequence[Call], expected: Sequence[Call]) -> bool:
    """Whether each call is another one of those expected."""
    if len(calls) != len(expected):
        return False
    if not calls:
        return True
    first, rest = calls[0], calls[1:]
    return any(_is(first, one) and _are(rest, [*expected[:place], *expected[place + 1 :]]) for place, one in enumerate(expected))


def _is(call: Call, expected: Call) -> bool:
    return call[0] == expected[0] and _fit(call[1], expected[1])


def _fit(given: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether all that is given is right, and nothing is missing that must be there."""
    if not set(given) <= set(right):
        return False
    # Of some arguments that are lists an empty one is right, which the leaderboard writes as no values.
    lists = {key: (values or [[]]) if isinstance(values, list) else [values] for key, values in right.items()}
    return all(
        any(_alike(given[key], one) for one in values) if key in given else LEFT_OUT in values for key, values in lists.items()
    )


def _alike(given: Any, right: Any) -> bool:
    if isinstance(given, str) and isinstance(right, str):
        return _plain(given) == _plain(right)
    if isinstance(given, dict) and isinstance(right, dict):
        return _fit(given, right)
    if isinstance(given, list) and isinstance(right, list):
        return len(given) == len(right) and all(map(_alike, given, right))
    return isinstance(given, bool) == isinstance(right, bool) and bool(given == right)


def _plain(text: str) -> str:
    return _SIGNS.sub("", text).casefold().replace("'", '"')
