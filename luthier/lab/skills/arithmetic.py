"""Sums: plain answers, and running sums and maxima with every step written out, sums whole or with noise.

The traces follow "Understanding the Effect of Noise in LLM Training Data with Algorithmic Chains of Thought" (arXiv:2402.04004):
static noise spoils the finished text and leaves the answer right; dynamic noise spoils a result while it is computed, and
everything behind it follows, the answer too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from luthier.errors import LuthierError
from luthier.lab.dice import Dice
from luthier.lab.skill import Item, Skill, Split
from luthier.lab.split import side_of, words

Slip = Callable[[int], int]
"""What a step's result becomes; equal to it where nothing goes wrong."""


class Line(NamedTuple):
    """One operation as it was carried out."""

    left: int
    sign: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.sign}{self.right}={self.result}"


class TracedInt:
    """A whole number that writes down every operation done with it.

    Args:
        value: the number.
        trace: where lines go; numbers made from this one share it.
        slip: what may go wrong in a result.
    """

    def __init__(self, value: int, trace: list[Line] | None = None, slip: Slip = lambda result: result) -> None:
        self.value, self.trace, self._slip = value, [] if trace is None else trace, slip

    def _done(self, sign: str, right: TracedInt | int, result: Callable[[int, int], int]) -> TracedInt:
        other = right.value if isinstance(right, TracedInt) else right
        found = self._slip(result(self.value, other))
        self.trace.append(Line(self.value, sign, other, found))
        return TracedInt(found, self.trace, self._slip)

    def __add__(self, other: TracedInt | int) -> TracedInt:
        return self._done("+", other, lambda left, right: left + right)

    def __sub__(self, other: TracedInt | int) -> TracedInt:
        return self._done("-", other, lambda left, right: left - right)

    def __mul__(self, other: TracedInt | int) -> TracedInt:
        return self._done("*", other, lambda left, right: left * right)

    def __floordiv__(self, other: TracedInt | int) -> TracedInt:
        return self._done("//", other, lambda left, right: left // right)

    def __mod__(self, other: TracedInt | int) -> TracedInt:
        return self._done("%", other, lambda left, right: left % right)


def running_sum(numbers: Sequence[int], slip: Slip = lambda result: result) -> list[Line]:
    """Add numbers one by one, beginning at 0; `numbers` of length K give K lines."""
    total = TracedInt(0, slip=slip)
    for number in numbers:
        total = total + number
    return total.trace


def written(lines: Sequence[Line]) -> str:
    """A trace as text, without the answer."""
    return " ".join(map(str, lines))


def dynamic(numbers: Sequence[int], intensity: float, dice: Dice) -> list[Line]:
    """The running sum where each result is off by 1 to 3, never right, with probability `intensity`; what follows builds on it."""

    def slip(result: int) -> int:
        if not dice.chance(intensity):
            return result
        return result + dice.pick([off for off in (-3, -2, -1, 1, 2, 3) if result + off >= 0])

    return running_sum(numbers, slip)


def static(text: str, intensity: float, dice: Dice) -> str:
    """A written trace where each digit is replaced by another with probability `intensity`."""
    return "".join(
        dice.pick([digit for digit in "0123456789" if digit != one]) if one.isdigit() and dice.chance(intensity) else one
        for one in text
    )


def _numbers(item: Item) -> list[int]:
    assert isinstance(item.prompt, str)
    return [int(one) for one in item.prompt.removeprefix("Add ").removesuffix(".").split(", ")]


def _traced(numbers: Sequence[int], lines: Sequence[Line], text: str | None = None) -> Item:
    answer = str(lines[-1].result)
    prompt = f"Add {', '.join(map(str, numbers))}."
    return Item(prompt, answer, f"{written(lines) if text is None else text} so {answer}")


def _spoil_trace(item: Item, dice: Dice, *, kind: Literal["static", "dynamic"] = "static", intensity: float = 0.1) -> Item:
    if not 0 <= intensity <= 1:
        raise LuthierError(
            f"intensity is a probability, not {intensity}", where="traces: intensity", fix="write a number from 0 to 1"
        )
    numbers = _numbers(item)
    if kind == "dynamic":
        return _traced(numbers, dynamic(numbers, intensity, dice))
    if kind == "static":
        lines = running_sum(numbers)
        return _traced(numbers, lines, static(written(lines), intensity, dice))
    raise LuthierError(f"there is no noise `{kind}`", where="traces: kind", fix="write static or dynamic")


def _traces(dice: Dice, difficulty: int, split: Split) -> Item:
    while True:
        numbers = [dice.number(1, 9) for _ in range(3 + difficulty)]
        item = _traced(numbers, running_sum(numbers))
        if not _tells_a_kept_sum(f"{item.prompt} {item.target}"):
            return item


def _tells_a_kept_sum(text: str) -> bool:
    """Whether three numbers in a row are a sum or a difference that `arithmetic` keeps from training."""
    numbers = [int(one) for one in words(text).split() if one.isdigit()]
    return any(
        third in (first + second, first - second) and side_of(f"{first}+{second}") != "train"
        for first, second, third in zip(numbers, numbers[1:], numbers[2:], strict=False)
    )


def _steps(prompt: str, steps: Sequence[int]) -> Item:
    return Item(prompt, str(steps[-1]), f"{' '.join(map(str, steps))} so {steps[-1]}")


def _largest(dice: Dice, difficulty: int, split: Split) -> Item:
    """Each step is the larger of the one before and the next number of the question."""
    while True:
        numbers = [dice.number(1, 9) for _ in range(3 + difficulty)]
        item = _steps(f"Largest of {', '.join(map(str, numbers))}.", list(accumulate(numbers, max)))
        if not _tells_a_kept_sum(f"{item.prompt} {item.target}"):
            return item


def _lost_maximum(item: Item, dice: Dice) -> Item:
    """From some step on another number stands in place of the largest."""
    assert isinstance(item.prompt, str)
    steps = [int(one) for one in item.target.split(" so ")[0].split()]
    first = dice.number(0, len(steps) - 1)
    wrong = dice.pick([one for one in range(1, 10) if one != steps[-1]])
    return _steps(item.prompt, [*steps[:first], *(wrong for _ in steps[first:])])


def _arithmetic(dice: Dice, difficulty: int, split: Split) -> Item:
    left, right = dice.number(0, 30 * difficulty), dice.number(0, 30 * difficulty)
    if dice.chance(0.5):
        return Item(f"{left}+{right}", str(left + right))
    return Item(f"{max(left, right)}-{min(left, right)}", str(abs(left - right)))


def _miscounted(item: Item, dice: Dice) -> Item:
    """A result that is off by 1 to 9, never below 0."""
    result = int(item.answer)
    return item._replace(answer=str(dice.pick([one for one in range(max(0, result - 9), result + 10) if one != result])))


ARITHMETIC = Skill("arithmetic", "add and subtract two numbers", _arithmetic, spoil=_miscounted)
TRACES = Skill(
    "traces",
    "add a list of numbers, every step written out",
    _traces,
    metric="last_number",
    max_new_tokens=64,
    pretrained=False,
    spoil=_spoil_trace,
    options={"kind": "static", "intensity": 0.1},
)
LARGEST = Skill(
    "largest",
    "find the largest of a list of numbers, every step written out",
    _largest,
    metric="last_number",
    max_new_tokens=32,
    pretrained=False,
    spoil=_lost_maximum,
)
