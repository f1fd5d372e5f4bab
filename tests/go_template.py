"""What Ollama does with a Modelfile and a conversation, for tests: the part of Go's template language that is written here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_ACTION = re.compile(r'\{\{(- )?\s*((?:"(?:\\.|[^"\\])*"|[^"}])*?)\s*( -)?\}\}', re.DOTALL)


def read_modelfile(text: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The instructions of a Modelfile by name, and its parameters in order."""
    found: dict[str, str] = {}
    parameters: list[tuple[str, str]] = []
    pattern = re.compile(r'(?:#[^\n]*|(\w+)[ \t]+(?:"""(.*?)"""|([^\n]*)))\s*', re.DOTALL)
    place = 0
    while place < len(text):
        match = pattern.match(text, place)
        assert match is not None, text[place:]
        place = match.end()
        if match[1] is None:
            continue
        value = match[2] if match[2] is not None else match[3].strip()
        if match[1] == "PARAMETER":
            name, _, value = value.partition(" ")
            parameters.append((name, value.strip().removeprefix('"').removesuffix('"')))
        else:
            assert match[1] not in found
            found[match[1]] = value
    # Ollama's parser drops signs that cannot be printed, but for white space.
    assert all(one.isprintable() or one.isspace() for one in text)
    return found, parameters


def render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama's server makes of a conversation."""
    system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
    given = [{"Role": one["role"], "Content": one["content"]} for one in messages]
    nodes = _parse(_tokens(template), [], ())[0]
    return _run(nodes, {"System": system, "Messages": given})


def _tokens(template: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    place, trims = 0, False
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip() if trims else text
        found.append(("text", text.rstrip() if match[1] else text))
        found.append(("action", match[2]))
        place, trims = match.end(), bool(match[3])
    text = template[place:]
    assert "{{" not in text, text
    return [*found, ("text", text.lstrip() if trims else text)]


def _parse(tokens: list[tuple[str, str]], nodes: list[Any], ends: tuple[str, ...]) -> tuple[list[Any], str]:
    while tokens:
        kind, value = tokens.pop(0)
        word = value.split(" ")[0]
        if kind == "action" and word in ends:
            return nodes, value
        if kind == "text":
            nodes.append(("text", value))
        elif word == "range":
            inner, _ = _parse(tokens, [], ("end",))
            nodes.append(("range", value.removeprefix("range "), inner))
        elif word == "if":
            nodes.append(_branch(tokens, value.removeprefix("if ")))
        else:
            nodes.append(("action", value))
    assert not ends, ends
    return nodes, ""


def _branch(tokens: list[tuple[str, str]], condition: str) -> Any:
    yes, closed = _parse(tokens, [], ("else", "end"))
    if closed == "end":
        return ("if", condition, yes, [])
    if closed.startswith("else if "):
        return ("if", condition, yes, [_branch(tokens, closed.removeprefix("else if "))])
    no, closed = _parse(tokens, [], ("end",))
    return ("if", condition, yes, no)


def _run(nodes: list[Any], dot: Mapping[str, Any]) -> str:
    out = ""
    for node in nodes:
        match node:
            case ("text", text):
                out += text
            case ("action", action) if action.startswith("template "):
                raise LookupError(f"template: no template {action}")
            case ("action", action):
                out += str(_value(action, dot))
            case ("if", condition, yes, no):
                out += _run(yes if _value(condition, dot) else no, dot)
            case ("range", items, inner):
                out += "".join(_run(inner, item) for item in _value(items, dot))
    return out


def _value(expression: str, dot: Mapping[str, Any]) -> Any:
    if expression.startswith("eq "):
        left, right = expression.removeprefix("eq ").split(" ", 1)
        return _value(left, dot) == _value(right, dot)
    if expression.startswith('"'):
        # Go reads \U with eight digits, too.
        return json.loads(re.sub(r"\\U([0-9a-f]{8})", lambda one: chr(int(one[1], 16)), expression), strict=True)
    assert re.fullmatch(r"\.[A-Z]\w*", expression), expression
    return dot[expression[1:]]
