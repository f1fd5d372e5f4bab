"""A recipe in the making: its keys, what differs at each of them, and what of the other tool's file has no place in it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from luthier.errors import cut_short, printable
from luthier.recipe.yaml_text import on_one_line
from luthier.registry.foreign import NONE, find

ORDER = (
    *(
        "name",
        "model",
        "add_tokens",
        "revision",
        "trust_remote_code",
        "quantize",
        "models",
        "tune",
        "rows",
        "objective",
        "token_weight",
    ),
    *("optimizer", "train", "seed", "track", "out"),
)
"""The keys of a recipe, in the order in which they are written."""
WIDTH = 100
"""Columns of a line, unless a value alone is longer."""
NOTHING_LIKE_IT = "luthier has nothing like it"


class Left(NamedTuple):
    """A key of the other tool that the recipe has no place for."""

    key: str
    value: str
    why: str


@dataclass
class Draft:
    """What a converter has found so far."""

    values: dict[str, Any] = field(default_factory=dict)
    """By whole key: `rows.train`."""
    remarks: dict[str, str] = field(default_factory=dict)
    """What differs, by whole key."""
    left: list[Left] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    """Keys of the other tool that have no place in a recipe, and nothing is lost."""

    def put(self, key: str, value: Any, remark: str = "") -> None:
        """Set a key, and say what differs."""
        self.values[key] = value
        self.note(key, remark)

    def note(self, key: str, remark: str) -> None:
        """Say something more of a key."""
        said = [self.remarks.get(key, ""), _line(remark)]
        self.remarks[key] = " ".join(one for one in said if one)

    def leave(self, key: str, value: Any, why: str = "") -> None:
        """Name a key that is not carried over, with the reason; without one the table of other tools' keys has it."""
        known = find(key.rpartition(".")[2])
        if not why and known is not None:
            why = ". ".join(one for one in ("" if known.here == NONE else f"See {known.here}", known.said) if one)
        why = why or NOTHING_LIKE_IT
        self.left.append(Left(_line(key), cut_short(_line(on_one_line(value)), 60), _line(why)))

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain data."""
        made: dict[str, Any] = {}
        for key in sorted(self.values, key=_place):
            section, _, name = key.rpartition(".")
            (made.setdefault(section, {}) if section else made)[name] = self.values[key]
        return made

    def text(self, title: str) -> str:
        """The recipe as YAML, with what differs as comments and what was not carried over at the end."""
        lines = [*_comment(title), ""]
        for key, value in self.recipe().items():
            if isinstance(value, Mapping) and key not in self.values:
                lines += ["", f"{key}:"]
                for name, inner in value.items():
                    lines += self._entry("  ", name, inner, self.remarks.get(f"{key}.{name}", ""))
                lines.append("")
            else:
                lines += self._entry("", key, value, self.remarks.get(key, ""))
        lines += ["", *self._rest()]
        return "\n".join(_once_empty(lines)).strip() + "\n"

    def _entry(self, indent: str, key: str, value: Any, remark: str) -> list[str]:
        several = key == "train" and isinstance(value, list)
        entry = f"{indent}{key}:" if several else f"{indent}{key}: {on_one_line(value)}"
        written = [entry, *(f"{indent}  - {on_one_line(one)}" for one in value)] if several else [entry]
        if remark and len(entry) + len(remark) + 4 <= WIDTH:
            return [f"{entry}  # {remark}", *written[1:]]
        return [*_comment(remark, indent), *written]

    def _rest(self) -> Iterator[str]:
        if self.left:
            yield "# Not carried over:"
        for key, value, why in self.left:
            yield f"#   {key}: {value}"
            yield from _comment(why, "", "#     ")
        if self.needless:
            yield from _comment(f"Nothing is lost without: {', '.join(self.needless)}.")


def _place(key: str) -> int:
    """Where a key's section stands; within it keys keep the order in which they were set."""
    return ORDER.index(key.partition(".")[0])


def _line(text: str) -> str:
    """Text that can do nothing but stand in a comment: one line, with what cannot be seen left out."""
    return " ".join(printable(text).split())


def _comment(text: str, indent: str = "", mark: str = "# ") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent + mark,
        subsequent_indent=indent + mark,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _once_empty(lines: list[str]) -> Iterator[str]:
    """Lines without two empty ones behind each other."""
    before = ""
    for line in lines:
        if line or before:
            yield line
        before = line
