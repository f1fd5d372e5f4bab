"""One error for everything a user can fix: what was wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

Say = Callable[[str], None]
"""Hears what is being done, a line at a time."""


def silent(text: str) -> None:
    """Hears and says nothing."""


class LuthierError(Exception):
    """A mistake the user can fix.

    Args:
        what: what was wrong, one sentence.
        where: the place: a file and line, a recipe key, a row id.
        fix: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))

    def as_json(self) -> dict[str, str]:
        """The same three facts for scripts."""
        return {"error": self.what, "where": self.where, "fix": self.fix}


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known names closest to `name`, or all of them when few."""
    names = sorted(str(candidate) for candidate in known)
    # Whoever writes LoRA or prompt-tuning means the name, which is all small letters.
    plain = {plain_name(candidate): candidate for candidate in reversed(names)}
    close = [plain[found] for found in difflib.get_close_matches(plain_name(name), plain, n=3, cutoff=0.6)]
    if close:
        return "did you mean " + " or ".join(f"`{candidate}`" for candidate in close) + "?"
    if names and len(names) <= 30:
        return "known: " + ", ".join(names)
    return ""


def plain_name(name: str) -> str:
    """A name as it is compared with others, however its letters and its dashes were written."""
    return name.lower().replace("-", "_")


def printable(text: str) -> str:
    """The text on one line and without what could steer a terminal: a space for each such character."""
    return "".join(one if one.isprintable() else " " for one in text)


def cut_short(text: str, most: int = 80) -> str:
    """A text of at most so many characters: a longer one ends in dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def refuse_truth(value: object, annotation: Any) -> None:
    """Refuse `true` and `false` where a number is asked for: Python itself would read them as 1 and 0.

    Raises:
        ValueError: as a validator of pydantic raises it.
    """
    kinds = (annotation, *get_args(annotation))
    if isinstance(value, bool) and (int in kinds or float in kinds) and bool not in kinds:
        raise ValueError("true and false are no numbers")


_BOUNDS = {
    "ge": "at least",
    "gt": "more than",
    "le": "at most",
    "lt": "less than",
    "min_length": "of a length of at least",
    "max_length": "of a length of at most",
}
_WRITE = {
    "int": "write a whole number",
    "float": "write a number",
    "finite": "write a finite number",
    "greater": "write a number",
    "less": "write a number",
    "bool": "write true or false",
    "string": "write text, in quotes where it looks like a number",
    "dict": "write a mapping, one `key: value` a line",
    "mapping": "write a mapping, one `key: value` a line",
    "model": "write a mapping, one `key: value` a line",
    "list": "write a list: [one, two]",
    "tuple": "write a list: [one, two]",
}


def explain(problem: Mapping[str, Any]) -> tuple[str, str]:
    """What is wrong with a value and what to write instead, from one of pydantic's error details."""
    shown = cut_short(repr(problem["input"]), 60)
    message = str(problem["msg"]).removeprefix("Value error, ")
    kind, limits = str(problem["type"]), problem.get("ctx", {})
    if kind.startswith(("dict", "mapping", "model")):
        message = "a mapping of keys belongs here"
    what = f"{shown}: {message[:1].lower()}{message[1:]}"
    if kind == "literal_error":
        return what, nearest(str(problem["input"]), re.findall("'([^']*)'", limits["expected"]))
    if kind == "value_error":
        return what, "write a number" if isinstance(problem["input"], bool) else "write what belongs here"
    if kind == "string_pattern_mismatch":
        return what, f"write text of the form {limits['pattern']}"
    bound = next((f"{words} {limits[name]:g}" for name, words in _BOUNDS.items() if name in limits), "")
    fix = _WRITE.get(kind.split("_")[0], "write another value")
    return what, f"{fix}, {bound}" if bound else fix
