"""Operations on strings of letters: copy, reverse, sort, count, case, and two of them one after the other."""

from __future__ import annotations

from collections.abc import Callable

from luthier.lab.dice import Dice
from luthier.lab.skill import Item, Skill, Split
from luthier.lab.skills.words import LETTERS

_Operation = Callable[[list[str]], list[str]]
_OPERATIONS: dict[str, _Operation] = {
    "reverse": lambda letters: letters[::-1],
    "capitals": lambda letters: [one.upper() for one in letters],
    "sort": sorted,
    "double": lambda letters: [one for one in letters for _ in range(2)],
}


def _letters(dice: Dice, low: int, high: int) -> list[str]:
    return [dice.pick(LETTERS) for _ in range(dice.number(low, high))]


def _shown(letters: list[str]) -> str:
    return " ".join(letters)


def _copy(dice: Dice, difficulty: int, split: Split) -> Item:
    letters = _letters(dice, 3, 4 + 2 * difficulty)
    return Item(f"{dice.pick(('Copy', 'Repeat'))}: {_shown(letters)}", _shown(letters))


def _reverse(dice: Dice, difficulty: int, split: Split) -> Item:
    letters = _letters(dice, 3, 3 + difficulty)
    return Item(f"{dice.pick(('Reverse', 'Backwards'))}: {_shown(letters)}", _shown(letters[::-1]))


def _sort(dice: Dice, difficulty: int, split: Split) -> Item:
    letters = dice.some(LETTERS, dice.number(3, 3 + difficulty))
    return Item(f"Sort: {_shown(letters)}", _shown(sorted(letters)))


def _count(dice: Dice, difficulty: int, split: Split) -> Item:
    few = dice.some(LETTERS, 3)
    letters = [dice.pick(few) for _ in range(dice.number(3, 4 + difficulty))]
    return Item(f"How many {few[0]} are in {_shown(letters)}?", str(letters.count(few[0])))


def _case(dice: Dice, difficulty: int, split: Split) -> Item:
    letters = _letters(dice, 3, 3 + difficulty)
    if dice.chance(0.5):
        return Item(f"Capitals: {_shown(letters)}", _shown(letters).upper())
    return Item(f"Small: {_shown(letters).upper()}", _shown(letters))


def _compose(dice: Dice, difficulty: int, split: Split) -> Item:
    letters = _letters(dice, 3, 3 + difficulty)
    names = dice.some(list(_OPERATIONS), 2)
    found = letters
    for name in names:
        found = _OPERATIONS[name](found)
    # Were the letters last, some rows would hold a whole item of a single operation: "... then sort: c a b", "a b c".
    return Item(f"First {names[0]}: {_shown(letters)}, then {names[1]}", _shown(found))


def _out_of_order(item: Item, dice: Dice) -> Item:
    """The same letters in another order."""
    letters = item.answer.split()
    while (found := dice.shuffled(letters)) == letters:
        pass
    return item._replace(answer=_shown(found))


COPY = Skill("copy", "repeat letters", _copy, max_new_tokens=24)
REVERSE = Skill("reverse", "write letters backwards", _reverse)
COUNT = Skill("count", "count a letter", _count)
CASE = Skill("case", "change between capitals and small letters", _case)
SORT = Skill("sort", "bring letters into order", _sort, pretrained=False, spoil=_out_of_order)
COMPOSE = Skill("compose", "two operations on letters, one after the other", _compose, pretrained=False, max_new_tokens=24)
