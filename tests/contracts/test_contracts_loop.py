"""Every technique through the real loop, killed between any two events: a run with evaluation, `best`, a step without targets and a
narrow type; and one that stops for want of patience. What is resumed is what would have been, bit for bit."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.kinds import Callback
from luthier.training.engine import Engine
from luthier.training.loop import Clock, Plans
from tests.contracts.combinations import traits
from tests.contracts.fixtures import OPTIONS, RUNS, part_of, rows_for, run_of
from tests.contracts.life import Curve, Life, assert_best
from tests.toys.helpers import model_of, toys  # noqa: F401
from tests.unit.test_kinds_resume import assert_equal, everything

STEPS = 6
LOOPED: dict[str, dict[str, Any]] = {
    "adalora": {"warmup": 0.2, "final": 0.3},
    "caft": {"heads_first": 0.34},
    "in_turns": {"forget": True},
    "masked_thought": {"warmup": 0.5},
}
"""Options with which phases end within so few steps, or more is remembered."""
STIRRED = {"dropout": 0.2, "noise": 0.1}
"""Options that draw in every pass: whoever measures in mid-run must not move the draws."""


def with_dropout() -> Any:
    """A tiny model that drops some of its attention while it learns."""
    model = model_of()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model


def life(
    kind: str, name: str, folder: Path, dtype: torch.dtype, idle: int | None, plans: Plans, curve: Curve | None = None
) -> Life:
    """One run of a technique, with options that draw and remember."""
    options = {**LOOPED.get(name, {}), **{o: value for o, value in STIRRED.items() if (kind, name, o) in OPTIONS}}

    def make(clock: Clock) -> Engine:
        return run_of(kind, name, options, model=with_dropout(), dtype=dtype, now=clock.at(0, 0.0))

    return Life(make, rows_for([kind]), folder, STEPS, () if idle is None else (idle,), plans, curve or {})


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_killed_between_any_two_events_and_measured_all_the_time(tmp_path: Path, kind: str, name: str) -> None:
    """In bf16 with fp32 masters, one step of six without a target. Measured after every step with `best`, killed after each and
    resumed, the run ends with the bits of one that nobody measured or killed; then the best numbers are those of then."""
    # Where a prompt has targets of its own every row has one, and a head reads rows without any.
    idle = None if traits[kind, name] & {"reads rows", "learns its prompt"} else 1 + zlib.crc32(name.encode()) % 3
    plain = life(kind, name, tmp_path / "plain", torch.bfloat16, idle, Plans())
    assert plain.process() is not None
    if idle is not None and idle + 1 not in plain.said:
        before, after = (plain.at_step[step][0] for step in (idle, idle + 1))
        if any(isinstance(value, Callback) and value.by_clock for value in part_of(kind, name).values):
            # What goes by the clock changes what it remembers, and no numbers.
            before, after = ({key: one for key, one in told.items() if not key.startswith("state ")} for told in (before, after))
        assert_equal(after, before)
    curve = dict(zip(range(1, STEPS + 1), (3.0, 4.0, 1.0, 2.0, 1.0, 5.0), strict=True))
    hard = life(kind, name, tmp_path / "hard", torch.bfloat16, idle, Plans(save_every=1, evaluate_every=1, best="set"), curve)
    for kill in (("told", 2), ("measured", 3), ("saved", 3), ("saved", 4), ("saved", 5)):
        assert hard.process(kill) is None
    ended = hard.process()
    assert ended is not None
    for step, taken in hard.at_step.items():
        for one in taken:
            assert_equal(one, plain.at_step[step][0])
    engine, progress = ended
    assert_equal(hard.at_end, plain.at_end)
    best = min(hard.counted, key=lambda step: curve[step])
    assert progress.best == curve[best] and [one["step"] for one in progress.evaluations] == list(range(1, STEPS + 1))
    assert progress.empty_steps == (idle is not None) and not progress.stopped
    assert_best(everything(engine), hard.at_step[best][0])


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_patience_ends_a_run_with_its_best_numbers(tmp_path: Path, kind: str, name: str) -> None:
    """In fp64: two evaluations without improvement end the run, and the numbers are those of the best one, bit for bit; also when it
    was killed between the two. Evaluations before the last phase of a technique do not count."""
    plans = Plans(save_every=1, evaluate_every=1, best="set", patience=2)
    idle = None if traits[kind, name] & {"reads rows", "learns its prompt"} else 2
    lived = life(kind, name, tmp_path, torch.float64, idle, plans, {1: 2.0, 2: 1.0, 3: 1.0, 4: 3.0, 5: 3.0, 6: 3.0})
    assert lived.process(("told", 4)) is None
    ended = lived.process()
    assert ended is not None
    engine, progress = ended
    best = min(lived.counted, key=lambda step: lived.curve[step])
    assert (progress.step, progress.best, progress.interrupted) == (min(best + 2, STEPS), lived.curve[best], False)
    assert progress.stopped == ("set has not improved in 2 evaluations" if best + 2 <= STEPS else "")
    first, again = lived.at_step[4]
    assert_equal(again, first)
    assert_best(everything(engine), lived.at_step[best][0])
