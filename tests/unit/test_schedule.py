"""Schedules by hand, warm-up in steps, and the clock that follows from them."""

from __future__ import annotations

import pytest

from luthier.errors import LuthierError
from luthier.kinds import Freezing
from luthier.training.loop import Clock
from luthier.training.schedule import SCHEDULES, constant, factor, linear, warmup_steps
from luthier.tune.turns import Turns

PROGRESS = (0.0, 0.25, 0.5, 0.8, 0.9, 1.0)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("constant", (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)),
        ("linear", (1.0, 0.75, 0.5, 0.2, 0.1, 0.0)),
        ("cosine", (1.0, 0.8535533906, 0.5, 0.0954915028, 0.0244717419, 0.0)),
        ("warmup_stable_decay", (1.0, 1.0, 1.0, 1.0, 0.5, 0.0)),
    ],
)
def test_schedules_by_hand(name: str, wanted: tuple[float, ...]) -> None:
    assert [SCHEDULES[name](one) for one in PROGRESS] == pytest.approx(wanted, abs=1e-9)


def test_the_factor_rises_in_the_warm_up_and_stays_at_the_end() -> None:
    assert [factor(linear, step, 6, 2) for step in range(8)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [factor(linear, step, 1, 0) for step in range(4)] == [1.0, 0.0, 0.0, 0.0]
    assert [factor(linear, step, 3, 3) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_a_warm_up_is_a_share_below_1_and_a_number_of_steps_from_there() -> None:
    assert [warmup_steps(warmup, 8) for warmup in (0.0, 0.25, 0.3, 1.0, 1.75, 8.0)] == [0, 2, 2, 1, 1, 8]
    with pytest.raises(LuthierError, match="a warm-up of 9 steps is longer than the run, which has 8"):
        warmup_steps(9.0, 8)


def test_the_clock_gives_each_phase_its_share_of_the_warm_up() -> None:
    """Phases of 4 and 8 steps share a warm-up of 3: 1 step and 2."""
    first = Freezing(ends=(1 / 3,), restart=True, alone=frozenset([0]))
    clock = Clock(12, 0.5, linear, 3, seed=7, stage=1, stages=2, turns=Turns({"first": first}, ["first", "second"]))
    wanted = [1.0, 1.0, 2 / 3, 1 / 3, 0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [clock.factor(step) for step in range(12)] == pytest.approx(wanted)
    now = clock.at(2, 0.25)
    assert (now.step, now.steps, now.epoch, now.stage, now.stages, now.seed) == (2, 12, 0.25, 1, 2, 7)
    assert now.learning_rate == pytest.approx(0.5 * 2 / 3)
    assert (clock.first("second").step, clock.first("first").step, clock.first("second").epoch) == (4, 0, 0.0)
    assert [clock.settled(steps) for steps in (4, 5)] == [False, True]


def test_the_clock_of_a_single_step() -> None:
    assert Clock(1, 1.0, constant, 0, 0).settled(1)
    # The only step is the last of its warm-up, not the first of the schedule.
    assert Clock(1, 1.0, lambda progress: 0.25, 1, 0).factor(0) == 1.0
    assert Clock(1, 1.0, lambda progress: 0.25, 0, 0).factor(0) == 0.25
