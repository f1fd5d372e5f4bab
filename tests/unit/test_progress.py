"""What a run writes into a log, where there is no terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from luthier.cli.progress import Bar, Lines, shown
from luthier.training.loop import Clock
from luthier.training.schedule import find_schedule


def run(steps: int, seconds: float = 1.0, first: int = 1, quiet: bool = False) -> list[str]:
    """The lines of a run whose every step takes so many seconds and 100 tokens."""
    clock = Clock(steps, 0.5, find_schedule("linear"), warmup=0, seed=0)
    log, time = io.StringIO(), [0.0]
    lines = Lines(Console(file=log, width=40), quiet=quiet, now=lambda: time[0])
    plan: Any = SimpleNamespace(clock=clock)
    with lines:
        for step in range(first, steps + 1):
            time[0] += seconds
            at: Any = SimpleNamespace(step=step, seconds=seconds * step, tokens=100 * step)
            result: Any = SimpleNamespace(loss=2.0 / step, nll=3.0, weights=None)
            lines.step(plan, at, result)
    return log.getvalue().splitlines()


def numbers(lines: list[str]) -> list[int]:
    return [int(line.split()[1].replace(",", "")) for line in lines]


def test_a_line_says_where_the_run_is() -> None:
    lines = run(4, seconds=2.0)
    assert lines[0] == "step 1 of 4, loss 2.000, learning rate 0.5, 50 tokens/s, 6.0 s left"
    assert lines[2].startswith("step 3 of 4, loss 0.667, learning rate 0.25, 50 tokens/s, 2")
    assert lines[3] == "step 4 of 4, loss 0.500, learning rate 0.125, 50 tokens/s, done"


@pytest.mark.parametrize(
    ("steps", "seconds", "first", "wanted"),
    [
        (4, 1.0, 1, [1, 2, 3, 4]),
        (50, 1.0, 1, [1, *range(2, 51, 2)]),
        (101, 0.1, 1, [1, *range(5, 101, 5), 101]),
        # A resumed run begins with a line, too.
        (100, 0.1, 88, [88, 90, 95, 100]),
        # Steps of 25 seconds: a line whenever a minute has passed since the last one.
        (200, 25.0, 1, [1, 4, 7, 10, 13, 16, 19, 20]),
    ],
)
def test_lines_come_at_sensible_steps(steps: int, seconds: float, first: int, wanted: list[int]) -> None:
    assert numbers(run(steps, seconds, first))[: len(wanted)] == wanted
    assert steps == 200 or len(run(steps, seconds, first)) == len(wanted)


def test_a_quiet_run_writes_nothing() -> None:
    assert run(4, quiet=True) == []


def test_a_terminal_gets_a_bar_and_a_log_gets_lines() -> None:
    assert isinstance(shown(Console(file=io.StringIO(), force_terminal=True), quiet=False), Bar)
    assert isinstance(shown(Console(file=io.StringIO(), force_terminal=False), quiet=False), Lines)


def test_text_of_a_log_is_no_markup() -> None:
    log = io.StringIO()
    Lines(Console(file=log, width=20), quiet=False).say("loading [red]model[/red] with a name longer than the line")
    assert log.getvalue() == "loading [red]model[/red] with a name longer than the line\n"
