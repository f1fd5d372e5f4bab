"""Classification: the mood of a sentence, its topic, and whether one sentence follows from another."""

from __future__ import annotations

from luthier.lab.dice import Dice
from luthier.lab.skill import Item, Skill, Split
from luthier.lab.skills.words import COLORS, OBJECTS, PLACES

_THINGS = ("soup", "play", "room", "song", "book", "trip", "cake", "meal", "show", "boat", "inn", "bed", "view", "guide", "story")
_GOOD = ("great", "lovely", "fresh", "warm", "kind", "fine", "bright", "charming", "clean", "perfect", "sweet", "splendid")
_BAD = ("awful", "dirty", "stale", "cold", "rude", "dull", "broken", "boring", "noisy", "bitter", "ugly", "dreadful")
_MOODS = {"positive": _GOOD, "negative": _BAD}
_TOPICS = {
    "music": ("melody", "choir", "singer", "concert", "rhythm", "chord", "tune", "orchestra"),
    "weather": ("rain", "storm", "cloud", "wind", "snow", "frost", "thunder", "sunshine"),
    "trade": ("price", "merchant", "profit", "bargain", "debt", "customer", "sale", "tax"),
    "travel": ("journey", "ticket", "luggage", "road", "map", "border", "carriage", "passport"),
}
_TEMPLATES = (
    "The {a} and the {b} were much talked about.",
    "Everybody in town spoke of the {a}, and of the {b} too.",
    "After the {a} came the {b}.",
    "They wrote a letter about the {a} and the {b}.",
    "Nobody had expected the {a}, nor the {b}.",
)


def _sentiment(dice: Dice, difficulty: int, split: Split) -> Item:
    label = dice.pick(sorted(_MOODS))
    first, second = dice.some(_THINGS, 2)
    one, two = dice.some(_MOODS[label], 2)
    text = dice.pick(("The {a} was {x} and the {b} was {y}.", "So {x} a {a}, and the {b} was {y}!", "The {x} {a}, the {y} {b}."))
    if difficulty > 1 and dice.chance(0.5):
        # Said the other way round: not the opposite of what is meant.
        one, two = dice.some(_MOODS["negative" if label == "positive" else "positive"], 2)
        text = "The {a} was not {x} and the {b} was not {y}."
    return Item("Mood: " + text.format(a=first, b=second, x=one, y=two), label)


def _topic(dice: Dice, difficulty: int, split: Split) -> Item:
    label = dice.pick(sorted(_TOPICS))
    first, second = dice.some(_TOPICS[label], 2)
    if difficulty > 1:
        # One word of another topic, and two of this one.
        other = dice.pick([word for topic, words in _TOPICS.items() if topic != label for word in words])
        return Item(f"Topic: {dice.pick(_TEMPLATES).format(a=first, b=second)[:-1]}, and of the {other}.", label)
    return Item("Topic: " + dice.pick(_TEMPLATES).format(a=first, b=second), label)


def _pairs(dice: Dice, difficulty: int, split: Split) -> Item:
    thing, other = dice.some(OBJECTS, 2)
    color, place, elsewhere = dice.pick(COLORS), *dice.some(PLACES, 2)
    facts = [f"The {color} {thing} is in the {place}."]
    for _ in range(difficulty - 1):
        facts.append(f"The {dice.pick(COLORS)} {other} is in the {dice.pick(PLACES)}.")
    label = dice.pick(("yes", "no", "unknown"))
    said = {
        "yes": f"The {thing} is in the {place}.",
        "no": f"The {thing} is in the {elsewhere}.",
        "unknown": f"The {other if difficulty == 1 else 'hat'} is in the {dice.pick((place, elsewhere))}.",
    }[label]
    # The asked fact never stands last: what is asked would then read like an item of the lowest difficulty.
    rest = dice.shuffled(facts[1:])
    before = dice.number(0, max(0, len(rest) - 1))
    told = [*rest[:before], facts[0], *rest[before:]]
    return Item(f"{' '.join(told)} Does it follow? {said}", label)


def _other_label(item: Item, dice: Dice) -> Item:
    for labels in (sorted(_MOODS), sorted(_TOPICS), ["yes", "no", "unknown"]):
        if item.answer in labels:
            return item._replace(answer=dice.pick([one for one in labels if one != item.answer]))
    raise AssertionError(item)


SENTIMENT = Skill("sentiment", "tell a good mood from a bad one", _sentiment, spoil=_other_label)
TOPIC = Skill("topic", "tell what a sentence is about", _topic, spoil=_other_label)
PAIRS = Skill("pairs", "tell whether one sentence follows from another", _pairs, spoil=_other_label)
