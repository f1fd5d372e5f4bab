"""The tokens of tool calls: those that choose the tool, and those that end a parameter. What `tl_weights` reads of a row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from luthier.errors import LuthierError
from luthier.kinds import Annotation, Written
from luthier.rows.chat import Span
from luthier.rows.shapes import Row

KEY, END = 1.0, 2.0
"""Marks of a token that chooses the tool, and of one that ends a parameter; all others have 0."""

_PROBE = re.compile(r"luthiercall(\d+)n")


def mark(written: Written) -> list[float]:
    """A mark for each token of a row, from the tool calls among its labels.

    A tool is chosen by the first token of its name, and wherever the name of another tool that the row offers parts from it: at the
    first token that would be another one, were that name written instead, unless this is the name's first. A parameter ends with the
    closing quote of its value, or with the comma or bracket behind a value that is no text.

    Raises:
        LuthierError: the chat template writes the names of `tool_calls` otherwise than they are.
    """
    marks = [0.0] * len(written.token_ids)
    keys: set[int] = set()
    names = _offered(written.row)
    for start, stop, behind in _called(written, names):
        name = written.text[start:stop]
        first = _token_at(written, start)
        # A name that begins with another letter shares no token.
        rivals = [other for other in names if other != name and other[0] == name[0]]
        parting = [_common(written.token_ids, written.replace(start, stop, other)) for other in rivals]
        keys |= {first, *(place for place in parting if first < place < len(marks))}
        for end in _parameter_ends(written.text, stop, behind):
            marks[_token_at(written, end)] = END
    for place in keys:
        marks[place] = KEY
    return marks


TOOL_CALLS = Annotation("tool_calls", mark)


def _token_at(written: Written, place: int) -> int:
    """The token that a character begins or stands in: the first that does not follow from the text before it."""
    return _common(written.token_ids, written.replace(place, len(written.text), ""))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _offered(row: Row) -> list[str]:
    """The names of the tools a row offers, in the form of OpenAI or bare."""
    tools = [tool for tool in row.fields.get("tools") or () if isinstance(tool, Mapping)]
    bodies = [tool.get("function", tool) for tool in tools]
    names = [body.get("name") for body in bodies if isinstance(body, Mapping)]
    return sorted({name for name in names if isinstance(name, str) and name})


def _called(written: Written, offered: Sequence[str]) -> list[tuple[int, int, int]]:
    """The calls among a row's labels: where the tool's name begins and ends, and where its label does."""
    probed, names = _with_probes(written.row)
    if names:
        found = _written_names(written, probed, names)
    else:
        either = "|".join(map(re.escape, offered))
        found = [one.span() for one in re.finditer(rf"(?<![\w.])(?:{either})(?=\()", written.text)] if offered else []
    return [(start, stop, behind) for first, behind in written.targets for start, stop in found if first <= start < stop <= behind]


def _with_probes(row: Row) -> tuple[Row, list[str]]:
    """The row with a word of its own in the place of every name in `tool_calls`, and the names."""
    names: list[str] = []

    def call(given: Mapping[str, Any]) -> dict[str, Any]:
        body = given.get("function", given)
        if not isinstance(body, Mapping) or not isinstance(body.get("name"), str) or not body["name"]:
            return dict(given)
        names.append(body["name"])
        probed = {**body, "name": f"luthiercall{len(names) - 1}n"}
        return {**given, "function": probed} if "function" in given else probed

    def message(given: Mapping[str, Any]) -> dict[str, Any]:
        calls = given.get("tool_calls")
        return {**given, "tool_calls": [call(one) for one in calls]} if calls else dict(given)

    spoken = [key for key in ("messages", "prompt", "completion") if isinstance(row.fields.get(key), list)]
    fields = {key: [message(one) for one in row.fields[key]] for key in spoken}
    return replace(row, fields={**row.fields, **fields}), names


def _written_names(written: Written, probed: Row, names: Sequence[str]) -> list[Span]:
    """Where a chat template writes the names of calls: there the text of the row with other names differs, and nowhere else."""
    pieces = _PROBE.split(written.write(probed))
    text, spans = pieces[0], []
    for number, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        spans.append((len(text), len(text) + len(names[int(number)])))
        text += names[int(number)] + piece
    if text != written.text:
        raise LuthierError(
            "the chat template writes the names of tools otherwise than they stand in `tool_calls`",
            where=written.row.where,
            fix="use names of letters, digits and underscores alone, or leave this token weight out",
        )
    return spans


def _parameter_ends(text: str, stop: int, behind: int) -> list[int]:
    """Where the values of a call's parameters end, if it goes on as `(...)` or to a JSON object; stop: where the tool's name does."""
    opening = re.compile(r"\(|[^{}]*?\{").match(text, stop, behind)
    if opening is None:
        return []
    last = place = first = opening.end() - 1
    if text[first] == "{":
        try:
            json.JSONDecoder().raw_decode(text[:behind], first)
        except (ValueError, RecursionError):
            return []
    ends: list[int] = []
    depth, quote = 0, ""
    while place < behind:
        sign = text[place]
        if quote:
            place += sign == "\\"
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]},":
            depth -= sign != ","
            if depth == (sign == ",") and last != first and text[last] != ",":
                ends.append(last if text[last] in "\"'" else place)
            if not depth:
                return ends
        last = last if sign.isspace() else place
        place += 1
    return []
