"""Entity tracking: things lie in boxes and are moved; where is one of them now? After Prakash et al. (arXiv:2402.14811)."""

from __future__ import annotations

from luthier.lab.dice import Dice
from luthier.lab.skill import Item, Skill, Split
from luthier.lab.skills.words import OBJECTS

_BOXES = "ABCDEFG"


def _boxes(dice: Dice, difficulty: int, split: Split) -> Item:
    things = dice.some(OBJECTS, 2 + difficulty)
    names = dice.some(_BOXES, min(len(_BOXES), 2 + difficulty))
    where = dict(zip(things, names, strict=False)) if len(things) <= len(names) else {one: dice.pick(names) for one in things}
    text = ", ".join(f"the {thing} is in box {box}" for thing, box in where.items())
    lines = [text[0].upper() + text[1:] + "."]
    for _ in range(difficulty):
        thing = dice.pick(things)
        where[thing] = dice.pick([box for box in names if box != where[thing]])
        lines.append(f"Move the {thing} to box {where[thing]}.")
    asked = thing if dice.chance(0.5) else dice.pick(things)
    return Item(f"{' '.join(lines)} Where is the {asked}?", f"box {where[asked]}")


BOXES = Skill("boxes", "follow things that are moved between boxes", _boxes)
