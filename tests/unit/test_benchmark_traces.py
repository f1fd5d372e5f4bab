"""Running sums with every step written out, and the two noises of arXiv:2402.04004: in the finished text, and in the computing."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.lab import benchmark
from luthier.lab.dice import Dice
from luthier.lab.skills.arithmetic import Line, TracedInt, dynamic, running_sum, static, written

NUMBERS = (1, 2, 3)
EQUATION = re.compile(r"(\d+)\+(\d+)=(\d+)")


def completions(**options: Any) -> list[str]:
    return [row["completion"] for row in benchmark.rows("traces", "train", 200, seed=3, **options)]


def prompted(seed: int = 3) -> list[list[int]]:
    return [[int(one) for one in re.findall(r"\d+", row["prompt"])] for row in benchmark.rows("traces", "train", 200, seed=seed)]


def within_three_sigma(samples: Sequence[int], expected: float) -> bool:
    error = statistics.stdev(samples) / len(samples) ** 0.5
    return abs(statistics.fmean(samples) - expected) < 3 * error


def slips(lines: Sequence[Line]) -> list[bool]:
    """For each step, whether its own result or one before it went wrong."""
    wrong = [line.result != line.left + line.right for line in lines]
    return [any(wrong[: step + 1]) for step in range(len(wrong))]


@pytest.mark.parametrize(
    ("operation", "sign", "result"),
    [
        (lambda a, b: a + b, "+", 22),
        (lambda a, b: a - b, "-", 12),
        (lambda a, b: a * b, "*", 85),
        (lambda a, b: a // b, "//", 3),
        (lambda a, b: a % b, "%", 2),
    ],
)
def test_a_traced_number_writes_each_operation_down(operation: Callable[..., TracedInt], sign: str, result: int) -> None:
    number = TracedInt(17)
    for other in (5, TracedInt(5)):
        found = operation(number, other)
        assert found.value == result and found.trace is number.trace
    assert number.trace == [Line(17, sign, 5, result)] * 2 and str(number.trace[0]) == f"17{sign}5={result}"


def test_a_slip_is_carried_on_by_every_operation() -> None:
    trace: list[Line] = []
    found = (TracedInt(4, trace, slip=lambda result: result + 1) * 3 - 2) % 7
    assert list(map(str, trace)) == ["4*3=13", "13-2=12", "12%7=6"] and found.value == 6


def test_the_partial_sums_of_one_two_three() -> None:
    assert [line.result for line in running_sum(NUMBERS)] == [1, 3, 6]
    assert written(running_sum(NUMBERS)) == "0+1=1 1+2=3 3+3=6"


def test_a_slip_at_the_second_step_spoils_what_follows() -> None:
    offsets = iter((0, 1, 0))
    lines = running_sum(NUMBERS, slip=lambda result: result + next(offsets))
    assert [line.result for line in lines] == [1, 4, 7] and written(lines) == "0+1=1 1+2=4 4+3=7"


def test_clean_traces_compute_the_sum_step_by_step() -> None:
    for numbers, completion in zip(prompted(), completions(), strict=True):
        trace, answer = completion.split(" so ")
        total = 0
        for number, line in zip(numbers, trace.split(" "), strict=True):
            assert line == f"{total}+{number}={total + number}"
            total += number
        assert int(answer) == total


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_without_intensity_or_share_rows_equal_the_clean_ones_byte_for_byte(kind: str) -> None:
    clean = benchmark.rows("traces", "train", 200, seed=3)
    assert benchmark.rows("traces", "train", 200, seed=3, noise=1.0, kind=kind, intensity=0.0) == clean
    assert benchmark.rows("traces", "train", 200, seed=3, noise=0.0, kind=kind, intensity=1.0) == clean


@pytest.mark.parametrize("intensity", [0.1, 0.5, 1.0])
def test_static_noise_replaces_digits_and_leaves_the_answer_right(intensity: float) -> None:
    noisy = completions(noise=1.0, kind="static", intensity=intensity)
    replaced = 0
    for numbers, clean, spoilt in zip(prompted(), completions(), noisy, strict=True):
        assert spoilt.split(" so ")[1] == str(sum(numbers))
        assert re.sub(r"\d", "9", spoilt) == re.sub(r"\d", "9", clean)
        trace, changed = (one.split(" so ")[0] for one in (clean, spoilt))
        digits = [old != new for old, new in zip(trace, changed, strict=True) if old.isdigit()]
        replaced += sum(digits)
        assert all(digits) or intensity < 1
    digits_in_all = sum(one.isdigit() for clean in completions() for one in clean.split(" so ")[0])
    error = (intensity * (1 - intensity) / digits_in_all) ** 0.5
    assert abs(replaced / digits_in_all - intensity) <= 3 * error


@pytest.mark.parametrize("intensity", [0.1, 1.0])
def test_dynamic_noise_computes_on_with_what_it_wrote(intensity: float) -> None:
    wrong = 0
    for numbers, completion in zip(prompted(), completions(noise=1.0, kind="dynamic", intensity=intensity), strict=True):
        trace, answer = completion.split(" so ")
        lines = [tuple(map(int, found)) for found in EQUATION.findall(trace)]
        assert trace == " ".join(f"{left}+{right}={result}" for left, right, result in lines)
        assert [right for _, right, _ in lines] == numbers
        assert [left for left, _, _ in lines] == [0, *(result for _, _, result in lines[:-1])]
        assert int(answer) == lines[-1][2]
        offsets = [result - left - right for left, right, result in lines]
        assert all(abs(off) <= 3 for off in offsets) and min(result for *_, result in lines) >= 0
        assert all(offsets) or intensity < 1
        wrong += int(answer) != sum(numbers)
    assert wrong > (150 if intensity == 1 else 20)


def test_wrong_partials_that_noise_of_one_intensity_causes() -> None:
    """Of 3 steps at 0.1, dynamic noise reaches 0.1 + 0.19 + 0.271 = 0.561 partial sums; static noise spoils 0.3."""
    reached, spoilt, matched = [], [], []
    for number in range(6000):
        dice = Dice("wrong partials", number)
        reached.append(sum(slips(dynamic(NUMBERS, 0.1, dice))))
        for intensity, found in ((0.1, spoilt), (0.187, matched)):
            results = [line.split("=")[1] for line in static(written(running_sum(NUMBERS)), intensity, dice).split(" ")]
            found.append(sum(one != right for one, right in zip(results, "136", strict=True)))
    assert within_three_sigma(reached, 0.561)
    assert within_three_sigma(spoilt, 0.3)
    assert within_three_sigma(matched, 0.561)
    assert not within_three_sigma(reached, 0.3) and not within_three_sigma(spoilt, 0.561)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("noise", [0.004, 0.25, 0.333, 1.0])
def test_the_share_of_noised_rows_is_exact_and_seeded(kind: str, noise: float) -> None:
    clean = completions()
    noisy = completions(noise=noise, kind=kind, intensity=1.0)
    changed = [number for number, (old, new) in enumerate(zip(clean, noisy, strict=True)) if old != new]
    assert len(changed) == round(noise * 200)
    assert noisy == completions(noise=noise, kind=kind, intensity=1.0)
    other = benchmark.rows("traces", "train", 200, seed=4, noise=noise, kind=kind, intensity=1.0)
    where = [
        n for n, (old, new) in enumerate(zip(benchmark.rows("traces", "train", 200, seed=4), other, strict=True)) if old != new
    ]
    assert len(where) == len(changed) and (where != changed or noise == 1)


def test_both_noises_spoil_the_same_rows() -> None:
    clean = completions()
    spoilt = [
        {number for number, one in enumerate(completions(noise=0.25, kind=kind, intensity=1.0)) if one != clean[number]}
        for kind in ("static", "dynamic")
    ]
    assert spoilt[0] == spoilt[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dynamik"}, "write static or dynamic"),
        ({"intensity": 10}, "write a number from 0 to 1"),
        ({"intensity": -0.1}, "write a number from 0 to 1"),
        ({"intensty": 0.1}, "did you mean `intensity`?"),
    ],
)
def test_noise_that_is_not_to_be_had(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LuthierError, match=re.escape(message)):
        benchmark.rows("traces", "train", 5, noise=1.0, **options)
