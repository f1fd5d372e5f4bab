"""A synthetic benchmark with skills that can be measured apart, and rows that teach them.

Everything is drawn from seeds, equal on every platform. Training rows and held-out items differ by construction: most skills
send an item to one side by a hash of its prompt's words; facts are held out by phrasing or by person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from luthier.errors import LuthierError, nearest
from luthier.evaluate.metrics import METRICS
from luthier.lab.dice import Dice
from luthier.lab.skill import Item, Skill, Split
from luthier.lab.skills import arithmetic, boxes, facts, labels, language, prompted, strings
from luthier.lab.split import side_of, words

_ALL = (
    *(facts.FACTS, facts.TWO_HOP, arithmetic.ARITHMETIC, boxes.BOXES),
    *(strings.COPY, strings.REVERSE, strings.COUNT, strings.CASE),
    *(labels.SENTIMENT, labels.TOPIC, labels.PAIRS),
    *(prompted.REFUSALS, language.TRANSLATE, prompted.IN_CONTEXT, language.STORIES),
    *(arithmetic.TRACES, strings.SORT, strings.COMPOSE, prompted.TOOLS),
    *(facts.NEW_FACTS, facts.UPDATED_FACTS, facts.SECOND_LANGUAGE, arithmetic.LARGEST),
)
SKILLS: Mapping[str, Skill] = {skill.name: skill for skill in _ALL}
"""Every skill by name: first those the built-in model was taught, then those left to teach."""

_TRIES = 200
"""Draws for one new held-out item before the skill counts as exhausted."""

_DRAWN_AS = {"held_out": "held_back"}
"""The word that draws follow from, where it is not the split's: with another one every item would be another."""


def find(name: str) -> Skill:
    """A skill by name.

    Raises:
        LuthierError: there is none, with the nearest name.
    """
    if name not in SKILLS:
        raise LuthierError(f"there is no skill `{name}`", where="the synthetic benchmark", fix=nearest(name, SKILLS))
    return SKILLS[name]


def rows(
    skill: str, split: Split, count: int, *, seed: int = 0, difficulty: int = 1, noise: float = 0.0, **options: Any
) -> list[dict[str, Any]]:
    """Rows of one skill, as recipes take them.

    Args:
        skill: one of `SKILLS`.
        split: `train` gives prompts with completions, which may repeat; `validation` and `held_out` prompts with answers, each
            once. Settings are chosen by `validation`, results told of `held_out`.
        count: rows.
        seed: of the draws; another seed gives other rows of the same world.
        difficulty: 1 is the easiest.
        noise: share of training rows that teach a wrong thing, exactly round(noise * count) of them.
        options: what the skill's noise takes, such as `kind="dynamic", intensity=0.1` for `traces`.

    Raises:
        LuthierError: there is no such skill or option, or not so many held-out items.
    """
    chosen = find(skill)
    _check(chosen, split, count, difficulty, noise, options)
    items = _items(chosen, split, count, seed, difficulty)
    if len(items) < count:
        raise LuthierError(
            f"`{skill}` has no {count} different {split} items at difficulty {difficulty}",
            where="the synthetic benchmark",
            fix=f"ask for {len(items)} or fewer",
        )
    for number in Dice("world", skill, "noise", seed).some(range(count), round(noise * count)):
        assert chosen.spoil is not None
        items[number] = chosen.spoil(items[number], Dice("world", skill, "noise", seed, number), **options)
    return _records(chosen, items, split, seed)


def sets(
    names: Sequence[str] | None = None,
    *,
    count: int = 100,
    role: Literal["target", "retention"] = "retention",
    seed: int = 0,
    difficulty: int = 1,
    split: Split = "held_out",
) -> dict[str, dict[str, Any]]:
    """Evaluation sets, as a recipe's `evaluate` takes them; without names, one for every skill.

    Args:
        names: of skills.
        count: items of each; a skill that has fewer gives all.
        role: what training should teach, or should leave alone.
        seed, difficulty, split: as for `rows`.
    """
    chosen = [find(name) for name in (SKILLS if names is None else names)]
    for skill in chosen:
        _check(skill, split, count, difficulty, 0.0, {})
    return {
        skill.name: {
            "rows": _records(skill, _items(skill, split, count, seed, difficulty), split, seed),
            "metric": skill.metric,
            "role": role,
            "max_new_tokens": skill.max_new_tokens,
        }
        for skill in chosen
    }


def check(skill: str, answer: str, row: Mapping[str, Any]) -> bool:
    """Whether an answer to a held-out row is right."""
    score = METRICS[find(skill).metric].score
    if score is None:
        raise LuthierError(f"`{skill}` is running text, which has no right answer", where="the synthetic benchmark")
    return score(answer, [row["answer"]]) == 1.0


def draw(skill: Skill, dice: Dice, difficulty: int, split: Split) -> Item:
    """One item on its side of the split."""
    while True:
        item = skill.make(dice, difficulty, split)
        if skill.splits != "by prompt" or side_of(item.prompt or item.answer) == split:
            return item


def _items(skill: Skill, split: Split, count: int, seed: int, difficulty: int) -> list[Item]:
    """So many items; outside training, each once, and no more than there are."""
    dice = Dice("world", skill.name, _DRAWN_AS.get(split, split), difficulty, seed)
    if split == "train":
        return [draw(skill, dice, difficulty, split) for _ in range(count)]
    found: dict[str, Item] = {}
    tries = 0
    while len(found) < count and tries < _TRIES:
        item = draw(skill, dice, difficulty, split)
        known = len(found)
        found.setdefault(words(item.prompt or item.answer), item)
        tries = 0 if len(found) > known else tries + 1
    return list(found.values())


def _records(skill: Skill, items: Sequence[Item], split: Split, seed: int) -> list[dict[str, Any]]:
    return [{"id": f"{skill.name}-{split}-{seed}-{number}", **_record(item, split)} for number, item in enumerate(items)]


def _record(item: Item, split: Split) -> dict[str, Any]:
    if not item.prompt:
        return {"text": item.answer}
    return (
        {"prompt": item.prompt, "completion": item.target} if split == "train" else {"prompt": item.prompt, "answer": item.answer}
    )


def _check(skill: Skill, split: str, count: int, difficulty: int, noise: float, options: Mapping[str, Any]) -> None:
    where = f"the synthetic benchmark, skill `{skill.name}`"
    if split not in get_args(Split):
        raise LuthierError(f"there is no split `{split}`", where=where, fix="write " + ", ".join(get_args(Split)))
    if count < 1 or not 1 <= difficulty <= skill.hardest:
        what = f"{count} rows of difficulty {difficulty}"
        raise LuthierError(what, where=where, fix=f"ask for at least 1 row, and for a difficulty from 1 to {skill.hardest}")
    if not 0 <= noise <= 1:
        raise LuthierError(f"noise is a share of the rows, not {noise}", where=where, fix="write a number from 0 to 1")
    if noise and (skill.spoil is None or split != "train"):
        raise LuthierError("there is no noise here", where=where, fix="noise is for training rows of: " + ", ".join(_spoilable()))
    for name in options:
        if name not in skill.options:
            raise LuthierError(f"there is no option `{name}`", where=where, fix=nearest(name, skill.options))


def _spoilable() -> list[str]:
    return [skill.name for skill in SKILLS.values() if skill.spoil is not None]
