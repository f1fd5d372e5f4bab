"""Which recipes a sweep compares: every combination of the values listed on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from luthier.errors import LuthierError, nearest
from luthier.lab.replication import CHOOSING_SEED
from luthier.recipe import EvaluationSet, Recipe, read_recipe

WHERE = "command line"
RATE_KEY = "train.learning_rate"
_ALIKE = ("name", "out", "seed", "evaluate")
"""Keys that must be the same in all variants: what is measured, at which seeds, and where it is kept."""
_OPENS, _CLOSES = "[{(", "]})"


class Settings(NamedTuple):
    """What `seeds=3 learning_rates=3 jobs=1 choose_by=SET` say of the sweep itself."""

    seeds: int = 3
    """Runs of each variant at its chosen rate, with the recipe's seed and those that follow it."""
    learning_rates: int = 3
    """Learning rates tried for each variant; 1: the advised one, without a search."""
    jobs: int = 1
    """Runs at a time."""
    choose_by: str | None = None
    """The evaluation set by which rates are chosen; none: the first that is marked as a target."""


class Asked(NamedTuple):
    """The words of the command line, read."""

    settings: Settings
    values: Mapping[str, tuple[str, ...]]
    """Of each key to set, in the order given; several values make several variants."""

    @property
    def listed(self) -> list[str]:
        """The keys with several values."""
        return [key for key, values in self.values.items() if len(values) > 1]


class Variant(NamedTuple):
    """One side of the comparison."""

    name: str
    """What sets it apart: its value where one key is listed, else `key=value` for each."""
    changes: Mapping[str, str]
    """The listed keys, with this variant's values."""
    recipe: Recipe

    @property
    def slug(self) -> str:
        """The name as a part of a folder's name."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")[:40].strip("-") or "variant"


def read_words(words: Sequence[str]) -> Asked:
    """Read `key=value,value` words.

    Args:
        words: keys of the recipe, and `seeds`, `learning_rates`, `jobs` and `choose_by`, which are the sweep's own.

    Raises:
        LuthierError: a word is no `key=value`, an empty list, a value or a key that stands twice, or a key that cannot be listed.
    """
    values: dict[str, tuple[str, ...]] = {}
    settings = Settings()
    seen: set[str] = set()
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise LuthierError(f"`{word}` is not key=value", where=WHERE, fix="write e.g. tune=full,lora")
        if key in seen:
            raise LuthierError(f"`{key}` stands twice", where=WHERE, fix="give it once, with all its values: tune=full,lora")
        seen.add(key)
        if key in Settings._fields:
            settings = _set(settings, key, text)
        else:
            values[key] = _checked(key, split_values(text))
    if settings.seeds > CHOOSING_SEED:
        raise LuthierError(f"{settings.seeds} seeds", where=f"{WHERE}: seeds", fix=f"use at most {CHOOSING_SEED}")
    return Asked(settings, values)


def split_values(text: str) -> tuple[str, ...]:
    """Cut at the commas that stand outside of brackets and quotes: `full,{lora: {rank: 4, alpha: 8}}` are two values."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in _OPENS) - (letter in _CLOSES)
        if letter == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    return tuple(piece.strip() for piece in pieces)


def variants_of(path: Path, asked: Asked) -> list[Variant]:
    """One variant for each combination of the listed values, the first key's values outermost.

    Raises:
        LuthierError: no such recipe, or an unknown key or a wrong value, as `luthier.recipe.read_recipe` finds them.
    """
    variants = []
    for combination in product(*asked.values.values()):
        chosen = dict(zip(asked.values, combination, strict=True))
        changes = {key: chosen[key] for key in asked.listed}
        recipe = read_recipe(path, [f"{key}={value}" for key, value in chosen.items()])
        variants.append(Variant(_name(changes, recipe), changes, recipe))
    return variants


def choosing_set(recipe: Recipe, named: str | None) -> str:
    """The evaluation set by which learning rates are chosen: the named one, else rows that are held out, else the first that is marked
    as a target.

    Raises:
        LuthierError: there is no such set.
    """
    if named is not None:
        if named not in recipe.measured():
            fix = nearest(named, recipe.measured()) or "name one of the recipe's"
            raise LuthierError(f"there is no evaluation set `{named}`", where=f"{WHERE}: choose_by", fix=fix)
        return named
    targets = _targets(recipe.measured())
    if not targets:
        raise LuthierError(
            "a sweep needs an evaluation set that shows what was learned",
            where="evaluate",
            fix="add `evaluate: {new: {rows: FILE, role: target}}` to the recipe",
        )
    return targets[0]


def target_set(recipe: Recipe, chosen_by: str) -> str:
    """The evaluation set that the page shows: the first target that did not choose the learning rates, else that one."""
    return next((name for name in _targets(recipe.measured()) if name != chosen_by), chosen_by)


def _targets(sets: Mapping[str, EvaluationSet]) -> list[str]:
    return [name for name, one in sets.items() if one.role == "target"]


def _name(changes: Mapping[str, str], recipe: Recipe) -> str:
    if len(changes) == 1:
        return next(iter(changes.values()))
    return " ".join(f"{key}={value}" for key, value in changes.items()) or recipe.name


def _set(settings: Settings, key: str, text: str) -> Settings:
    if key == "choose_by":
        return settings._replace(choose_by=text)
    whole = _whole(key, text)
    return Settings(**{**settings._asdict(), key: whole})


def _whole(key: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise LuthierError(f"`{text}` is no number of {key}", where=f"{WHERE}: {key}", fix=f"write a whole number, e.g. {key}=3")
    return int(text)


def _checked(key: str, values: tuple[str, ...]) -> tuple[str, ...]:
    where = f"{WHERE}: {key}"
    if not all(values):
        what = "has nothing between two commas" if len(values) > 1 else "lists nothing"
        raise LuthierError(f"`{key}` {what}", where=where, fix=f"write {key}=one,two")
    if len(set(values)) < len(values):
        raise LuthierError(f"`{key}` lists a value twice", where=where, fix="leave out one of the two")
    if key.partition(".")[0] == "out":
        raise LuthierError("the runs of a sweep lie in the sweep's folder", where=where, fix="use --out FOLDER")
    if len(values) > 1 and key.partition(".")[0] in _ALIKE:
        fix = "use seeds=N" if key == "seed" else "give it one value"
        raise LuthierError(f"`{key}` must be the same in all variants", where=where, fix=fix)
    return values
