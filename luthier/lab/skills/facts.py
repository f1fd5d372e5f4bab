"""Facts about people and cities, in many phrasings: (entity, relation, value).

Who has which value is drawn once for all worlds, so every seed tells of the same people. Training asks in some phrasings,
held-out items in others.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from luthier.lab.dice import Dice
from luthier.lab.skill import Item, Skill, Split
from luthier.lab.skills.words import ANIMALS, CITIES, COUNTRIES, FIRST_NAMES, FOODS, INSTRUMENTS, JOBS, LAST_NAMES, RIVERS

KNOWN, UPDATED, NEW = 260, 60, 80
"""People the built-in model knows, people it knows whose facts change later, and people it has never heard of."""


class Relation(NamedTuple):
    """One thing one may know of an entity."""

    values: tuple[str, ...]
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    second_language: str = ""


PERSON = {
    "city": Relation(
        CITIES,
        (
            "Where was {e} born?",
            "In which city was {e} born?",
            "Name the city where {e} was born.",
            "{e} was born in which city?",
            "Tell me where {e} was born.",
        ),
        ("Name the city in which {e} was born.", "Tell me in which city {e} was born."),
        "{e} nasu velo?",
    ),
    "job": Relation(
        JOBS,
        (
            "What work does {e} do?",
            "What is the job of {e}?",
            "Name the job of {e}.",
            "{e} does which job?",
            "Tell me what work {e} does.",
        ),
        ("Tell me what the job of {e} is.", "Which job does {e} do?"),
        "{e} talan velo?",
    ),
    "pet": Relation(
        ANIMALS,
        (
            "Which animal does {e} keep?",
            "What is the pet of {e}?",
            "Name the pet of {e}.",
            "{e} keeps which animal?",
            "Tell me which animal {e} keeps.",
        ),
        ("Tell me what the pet of {e} is.", "Name the animal {e} keeps."),
        "{e} mirut velo?",
    ),
    "instrument": Relation(
        INSTRUMENTS,
        (
            "Which instrument does {e} play?",
            "What does {e} play?",
            "Name the instrument of {e}.",
            "{e} plays which instrument?",
            "Tell me which instrument {e} plays.",
        ),
        ("Name the instrument {e} plays.", "Tell me what {e} plays."),
        "{e} sonor velo?",
    ),
    "food": Relation(
        FOODS,
        (
            "What does {e} like to eat?",
            "Which food does {e} like?",
            "Name the food {e} likes.",
            "{e} likes to eat what?",
            "Tell me which food {e} likes.",
        ),
        ("Tell me what {e} likes to eat.", "Name what {e} likes to eat."),
        "{e} gomar velo?",
    ),
}
CITY = {
    "country": Relation(
        COUNTRIES,
        ("In which country is {e}?", "Name the country of {e}.", "{e} is in which country?", "Tell me which country {e} is in."),
        ("Tell me in which country {e} is.", "Name the country {e} is in."),
    ),
    "river": Relation(
        RIVERS,
        ("Which river runs through {e}?", "Name the river of {e}.", "{e} has which river?", "Tell me which river {e} has."),
        ("Name the river that runs through {e}.", "Tell me which river runs through {e}."),
    ),
}


class World(NamedTuple):
    """Who is who."""

    known: tuple[str, ...]
    updated: tuple[str, ...]
    new: tuple[str, ...]
    facts: dict[tuple[str, str], str]
    """By entity and relation."""
    changed: dict[tuple[str, str], str]
    """Facts of `updated` people that contradict the earlier ones."""


@cache
def world() -> World:
    """The people and cities, always the same."""
    dice = Dice("world", "facts")
    people = dice.some([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], KNOWN + UPDATED + NEW)
    facts = {(one, name): dice.pick(relation.values) for one in people for name, relation in PERSON.items()}
    facts |= {(one, name): dice.pick(relation.values) for one in CITIES for name, relation in CITY.items()}
    known, updated, new = people[:KNOWN], people[KNOWN : KNOWN + UPDATED], people[KNOWN + UPDATED :]
    changed = {
        (one, name): dice.pick([value for value in PERSON[name].values if value != facts[one, name]])
        for one in updated
        for name in PERSON
    }
    return World(tuple(known), tuple(updated), tuple(new), facts, changed)


def triples() -> list[tuple[str, str, str]]:
    """Every fact of the world, those that contradict earlier ones too."""
    here = world()
    return [(entity, name, value) for facts in (here.facts, here.changed) for (entity, name), value in facts.items()]


def _asked(dice: Dice, entity: str, name: str, value: str, split: Split) -> Item:
    relation = PERSON.get(name) or CITY[name]
    phrasings = {"train": relation.trained, "validation": relation.held_out[:1], "held_out": relation.held_out[1:]}
    return Item(dice.pick(phrasings[split]).format(e=entity), value)


def _facts(dice: Dice, difficulty: int, split: Split) -> Item:
    here = world()
    if dice.chance(0.1):
        entity, name = dice.pick(CITIES), dice.pick(sorted(CITY))
    else:
        # What is told of these people later contradicts this: whether it is still known is not asked.
        people = here.known + here.updated if split == "train" else here.known
        entity, name = dice.pick(people), dice.pick(sorted(PERSON))
    return _asked(dice, entity, name, here.facts[entity, name], split)


def _new_facts(dice: Dice, difficulty: int, split: Split) -> Item:
    here = world()
    entity, name = dice.pick(here.new), dice.pick(sorted(PERSON))
    return _asked(dice, entity, name, here.facts[entity, name], split)


def _updated_facts(dice: Dice, difficulty: int, split: Split) -> Item:
    here = world()
    entity, name = dice.pick(here.updated), dice.pick(sorted(PERSON))
    return _asked(dice, entity, name, here.changed[entity, name], split)


def _people(split: Split) -> tuple[str, ...]:
    """Of the known people, those whose questions may be trained on, or the others."""
    known = world().known
    cut, rest = len(known) * 6 // 8, len(known) * 7 // 8
    return {"train": known[:cut], "validation": known[rest:], "held_out": known[cut:rest]}[split]


def _two_hop(dice: Dice, difficulty: int, split: Split) -> Item:
    facts = world().facts
    person = dice.pick(_people(split))
    city = facts[person, "city"]
    if dice.chance(0.5):
        asked = dice.pick(
            ("In which country was {e} born?", "Name the country where {e} was born.", "{e} was born in which country?")
        )
        return Item(asked.format(e=person), facts[city, "country"])
    asked = dice.pick(("Which river runs through the city where {e} was born?", "Name the river of the city where {e} was born."))
    return Item(asked.format(e=person), facts[city, "river"])


def _second_language(dice: Dice, difficulty: int, split: Split) -> Item:
    person, name = dice.pick(_people(split)), dice.pick(sorted(PERSON))
    return Item(PERSON[name].second_language.format(e=person), world().facts[person, name])


def _other_value(item: Item, dice: Dice) -> Item:
    """Another value of the relation that is asked for."""
    values = next(relation.values for relation in (*PERSON.values(), *CITY.values()) if item.answer in relation.values)
    return item._replace(answer=dice.pick([one for one in values if one != item.answer]))


FACTS = Skill("facts", "answer questions about people and cities", _facts, splits="by phrasing")
NEW_FACTS = Skill(
    "new_facts",
    "answer questions about people it never heard of",
    _new_facts,
    splits="by phrasing",
    pretrained=False,
    spoil=_other_value,
)
UPDATED_FACTS = Skill(
    "updated_facts", "give the new answers where facts have changed", _updated_facts, splits="by phrasing", pretrained=False
)
TWO_HOP = Skill("two_hop", "put two facts together", _two_hop, splits="by person")
SECOND_LANGUAGE = Skill(
    "second_language",
    "answer in another language what it knows in English",
    _second_language,
    splits="by person",
    pretrained=False,
    spoil=_other_value,
)
