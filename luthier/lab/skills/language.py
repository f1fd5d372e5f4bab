"""A second language with its own words and word order, and running text."""

from __future__ import annotations

from luthier.lab.dice import Dice
from luthier.lab.skill import Item, Skill, Split
from luthier.lab.skills.words import CITIES, FIRST_NAMES, FOODS, OBJECTS, PLACES

_NOUNS = {
    "dog": "karu", "cat": "mipa", "horse": "tolge", "king": "areth", "girl": "lissa", "boy": "domek", "bird": "sivu",
    "house": "bantor", "tree": "orlu", "river": "wenna", "stone": "grath", "bread": "pimo", "fish": "nolu", "door": "ketta",
}  # fmt: skip
_ADJECTIVES = {
    "red": "rosk", "small": "titi", "old": "garn", "big": "bolo", "young": "jivi", "white": "alba", "quiet": "shum", "happy": "lio",
}  # fmt: skip
_VERBS = {"sees": "viden", "likes": "amoren", "finds": "troven", "carries": "porten", "follows": "segen", "paints": "maluren"}


def _translate(dice: Dice, difficulty: int, split: Split) -> Item:
    """Adjectives stand behind their noun there, and the verb at the end; articles there are none."""
    one, two = dice.some(sorted(_NOUNS), 2)
    verb = dice.pick(sorted(_VERBS))
    english, foreign = [], []
    for place, noun in enumerate((one, two)):
        adjectives = dice.some(sorted(_ADJECTIVES), dice.number(0, difficulty) if place == 0 else difficulty - 1)
        english.append(" ".join(["the", *adjectives, noun]))
        foreign.append(" ".join([_NOUNS[noun], *(_ADJECTIVES[word] for word in adjectives)]))
    return Item(f"Translate: {english[0]} {verb} {english[1]}", f"{foreign[0]} {foreign[1]} {_VERBS[verb]}")


def _stories(dice: Dice, difficulty: int, split: Split) -> Item:
    """A few sentences about two people and a thing, which hang together."""
    hero, friend = dice.some(FIRST_NAMES, 2)
    thing, food = dice.pick(OBJECTS), dice.pick(FOODS)
    start, end = dice.some(PLACES, 2)
    city = dice.pick(CITIES)
    lines = [
        dice.pick((f"One morning {hero} went to the {start} in {city}.", f"{hero} lived in {city}, near the {start}.")),
        dice.pick((f"There {hero} lost a {thing}.", f"In the {start} {hero} could not find the {thing}.")),
        dice.pick(
            (f"{friend} came by with some {food} and asked what was wrong.", f"{friend}, who was eating {food}, wanted to help.")
        ),
        dice.pick((f"They looked for the {thing} everywhere.", f"Together they looked for the {thing} until evening.")),
        dice.pick((f"At last {friend} found the {thing} in the {end}.", f"The {thing} was in the {end}, where {friend} found it.")),
        dice.pick(
            (
                f"{hero} thanked {friend}, and they ate the {food}.",
                f"So {hero} had the {thing} again, and {friend} kept the {food}.",
            )
        ),
    ]
    for _ in range(difficulty - 1):
        lines.append(f"The next day {dice.pick((hero, friend))} hid the {dice.pick(OBJECTS)} in the {dice.pick(PLACES)}.")
    return Item("", " ".join(lines))


TRANSLATE = Skill("translate", "say a sentence in the second language", _translate)
STORIES = Skill("stories", "continue running text", _stories, metric="loss")
