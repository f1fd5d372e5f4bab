"""The registry: techniques and their cards, the keys of a recipe that hold them, and the papers they come from."""

from luthier.registry.cards import Card, Part, Technique, method, slots, values_of
from luthier.registry.keys import COMMANDS, KEYS, KINDS, Key, fields_under, key_of, kind_of, kinds_under
from luthier.registry.techniques import (
    NOTHING,
    add_folder,
    cards,
    find,
    find_under,
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
    "KINDS",
    "NOTHING",
    "Card",
    "Key",
    "Part",
    "Technique",
    "add_folder",
    "cards",
    "fields_under",
    "find",
    "find_under",
    "key_of",
    "kind_of",
    "kinds_under",
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
    "values_of",
]
