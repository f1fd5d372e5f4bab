"""Which techniques a recipe names, by key, looked up and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier import registry
from luthier.recipe.schema import Recipe
from luthier.registry import Part

Chosen = Mapping[str, Sequence[Part]]
"""A run's parts by the recipe's key, in the order of `luthier.registry.KEYS`."""


def choose_parts(recipe: Recipe, **instead: object) -> Chosen:
    """All techniques a recipe names, and those that join it because nothing does their work, such as cross-entropy.

    Args:
        recipe: names them.
        instead: what stands under some of its keys instead.

    Raises:
        LuthierError: unknown technique or option, with the nearest name, an option of the wrong type, or a technique of another key.
    """
    return completed({name: instead.get(name, key.of(recipe)) for name, key in registry.KEYS.items()})


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
