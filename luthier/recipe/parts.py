"""Which techniques a recipe names, by key, looked up and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier import registry
from luthier.errors import LuthierError
from luthier.recipe.schema import Recipe
from luthier.recipe.schema import plain as as_plain
from luthier.registry import Part

Chosen = Mapping[str, Sequence[Part]]
"""A run's parts by the recipe's key, in the order of `luthier.registry.KEYS`."""


def choose_parts(recipe: Recipe) -> Chosen:
    """All techniques a recipe names, and those that join it because nothing does their work, such as cross-entropy.

    Raises:
        LuthierError: unknown technique or option, with the nearest name, an option of the wrong type, or a technique of another key.
    """
    return completed({name: key.of(recipe) for name, key in registry.KEYS.items()})


def completed(specs: Mapping[str, object]) -> Chosen:
    """The parts of what stands under each key; keys that are missing hold nothing.

    Raises:
        LuthierError: as `choose_parts`.
    """
    chosen = {name: registry.make_all(specs.get(name), name) for name in registry.KEYS}
    values = [value for _, value in registry.values_of(chosen)]
    for name, key in registry.KEYS.items():
        if key.otherwise and not any(map(key.brings, values)):
            chosen[name] = [*chosen[name], registry.part(key.otherwise)]
    return chosen


def spelled_out(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain data in which techniques stand with all their options, and those that join it by themselves are named: equal for
    recipes that ask for the same in other words. Where a technique cannot be looked up here, all stand as they are."""
    specs = {name: _at(plain, key.path) for name, key in registry.KEYS.items()}
    try:
        chosen = completed(specs)
    except LuthierError:
        return dict(plain)
    named = {name: [{part.name: as_plain(part.options)} for part in parts] for name, parts in chosen.items()}
    rows = {key: value for key, value in (plain.get("rows") or {}).items() if f"rows.{key}" not in named}
    return {**{key: value for key, value in plain.items() if key not in named}, "rows": rows, "techniques": named}


def _at(data: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = data
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found
