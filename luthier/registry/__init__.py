"""The registry: techniques and their cards, the keys of a recipe that hold them, and the papers they come from."""

from luthier.registry.cards import Card, Part, Technique, method, slots
from luthier.registry.techniques import (
    COMMANDS,
    KEYS,
    NOTHING,
    add_folder,
    cards,
    find,
    make,
    make_all,
    module_at,
    names,
    option_error,
    options_model,
    part,
    remove_folder,
)

__all__ = [
    "COMMANDS",
    "KEYS",
    "NOTHING",
    "Card",
    "Part",
    "Technique",
    "add_folder",
    "cards",
    "find",
    "make",
    "make_all",
    "method",
    "module_at",
    "names",
    "option_error",
    "options_model",
    "part",
    "remove_folder",
    "slots",
]
