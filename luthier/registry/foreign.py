"""Keys of other tools, and earlier names of luthier's own: what each is called here, and what differs.

`foreign_keys.tsv` and `renamed_keys.tsv` own them; the glossary's tables, the errors of unknown keys and `luthier convert` read them here.
What stands under *here* can be read by people and programs alike: a key of a recipe (`train.epochs`), a key with its value
(`quantize: nf4`), an option and its technique (`rank` of `lora`), a command (`luthier export`), or none.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from luthier.errors import plain_name

NONE = "none"
"""What has no counterpart is called."""


@dataclass(frozen=True)
class Foreign:
    """One line of the table: keys of other tools that mean the same."""

    part: str
    """The heading that it stands under."""
    theirs: str
    """The keys, as Markdown, some with the tool that they belong to in brackets."""
    here: str
    """What stands for them here, as Markdown, or `none`."""
    differs: str
    """What is not the same, in a sentence or two, as Markdown; empty where nothing is."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys by themselves."""
        return tuple(re.findall(r"`([^`:]+)`", self.theirs))

    @property
    def said(self) -> str:
        """What differs, in plain text."""
        return re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", self.differs)


@dataclass(frozen=True)
class Renamed:
    """A key of luthier that had another name."""

    old: str
    """With what it stands under: `rows.shape`, `dpo.smoothing`; alone where it is of the recipe itself, or of several techniques."""
    new: str
    remark: str


def foreign() -> Sequence[Foreign]:
    """The table of other tools' keys, in the order in which it is read."""
    return [Foreign(**line) for line in _lines("foreign_keys.tsv")]


def renamed() -> Sequence[Renamed]:
    """The table of earlier names."""
    return [Renamed(**line) for line in _lines("renamed_keys.tsv")]


def find(key: str) -> Foreign | None:
    """What is known of another tool's key; None where no tool has it."""
    return _by_key().get(plain_name(key))


def hint(key: str, section: str = "", known: Collection[str] = ()) -> str:
    """What to do about a key that is unknown where it stands: an instruction, empty where neither table has the key.

    Args:
        key: the unknown key.
        section: what it stands under: `rows`, `evaluate.NAME` or a technique; empty for the recipe itself.
        known: the keys that are known there.
    """
    new = _renamed().get(f"{section}.{key}" if section else key, _renamed().get(key, ""))
    if "." in new or new in known:
        return f"write `{_short(new, section, known)}`, which is its name now"
    found = find(key)
    if found is None:
        return ""
    if found.here == NONE:
        return f"leave it out. {found.said}" if found.said else "leave it out: luthier has nothing like it"
    spans = re.findall(r"`([^`]+)`", found.here)
    near = [f"`{short}`" for short in (_short(span, section, known) for span in spans) if short in known]
    above = " at the top of the recipe" if found.here == f"`{key}`" else ""
    return f"write {near[0] if near else found.here}{above}. {found.said}".rstrip()


def _short(name: str, section: str, known: Collection[str]) -> str:
    """A key as it is written where it stands."""
    above, _, last = name.rpartition(".")
    return last if above == section and last in known else name


@cache
def _by_key() -> Mapping[str, Foreign]:
    return {plain_name(key): line for line in foreign() for key in line.keys}


@cache
def _renamed() -> Mapping[str, str]:
    return {line.old: line.new for line in renamed()}


def _lines(name: str) -> list[dict[str, str]]:
    text = resources.files("luthier.registry").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
