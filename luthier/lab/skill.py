"""What a skill of the synthetic benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from luthier.lab.dice import Dice

Split = Literal["train", "validation", "held_out"]
"""What a model learns from, what settings such as learning rates are chosen by, and what it is judged by."""
Prompt = str | list[dict[str, str]]


class Item(NamedTuple):
    """One question of the world, or one text."""

    prompt: Prompt
    """The question, or the turns before the answer; empty where the item is a text."""
    answer: str
    """The one right answer, as the checker wants it; for a text, the text."""
    completion: str | None = None
    """What a model should write where that is more than the answer, such as a trace."""

    @property
    def target(self) -> str:
        """What a model is trained to write."""
        return self.answer if self.completion is None else self.completion


class Skill(NamedTuple):
    """Something a model can learn, apart from all else.

    `make(dice, difficulty, split)` draws one item. The split is by the prompt's hash, unless the skill `splits` itself: then
    `make` minds the split, and the same prompt never comes in both.
    """

    name: str
    meaning: str
    make: Callable[[Dice, int, Split], Item]
    metric: str = "equal"
    """The checker, one of `luthier.evaluate.metrics.METRICS`."""
    max_new_tokens: int = 16
    pretrained: bool = True
    """Whether the built-in model was taught it."""
    splits: str = "by prompt"
    """How training and held-out items differ, in words."""
    spoil: Callable[..., Item] | None = None
    """`spoil(item, dice, **options)`: the item with a fault in what it teaches."""
    options: Mapping[str, Any] = {}
    """What `spoil` takes, with defaults."""
    hardest: int = 9
    """The greatest difficulty there are words enough for."""
