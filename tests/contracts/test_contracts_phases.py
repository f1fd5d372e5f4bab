"""What a technique with phases leaves at the end is what its card says: beside others that hold it still for a while, with steps without
targets at its borders, killed there and resumed, in a narrow type, and when the run goes back to its best state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.training.engine import Engine
from luthier.training.loop import Clock, Plans
from tests.contracts.fixtures import engine_of
from tests.contracts.life import Life, assert_best
from tests.toys.helpers import model_of, rows_of_eight, toys  # noqa: F401
from tests.unit.test_kinds_resume import assert_equal, everything

STEPS = 12
ATTENTION = ["attention"]
TUNES: dict[str, Any] = {
    "adalora": {"initial_rank": 3, "target_rank": 2, "warmup": 0.1, "final": 0.4, "target_modules": ATTENTION},
    "loca": {"coefficients": 6, "search": 0.5, "coefficient_steps": 1, "location_steps": 1, "target_modules": ATTENTION},
    "lofit": {"selection": 0.5, "share": 0.5},
    "lt_sft": {"share": 0.02, "target_modules": ATTENTION},
    "spiel": {"density": 0.005, "every": 4, "gather": 2, "target_modules": ATTENTION},
    "lift": {"rank": 2, "lora_rank": 1, "every": 3, "target_modules": ATTENTION},
}
"""Options with which phases, or changes of what trains, fit into so few steps."""
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "promot": {"tune": [{"promot": {"length": 2, "share": 0.34}}]},
    "caft": {"objective": {"caft": {"heads": 1, "heads_first": 0.25}}},
    "greentrainer": {"tune": [{"greentrainer": {"target_modules": ["mlp_down"], "target": 0.7, "selections": 2}}]},
}
GREEN = {"target_modules": ["mlp_down", "attention"], "target": 0.7, "selections": 3}
HALF = {"half": {"target_modules": ATTENTION}}
PHASED: dict[str, dict[str, Any]] = {
    **{name: {"tune": [{name: options}]} for name, options in TUNES.items()},
    "greentrainer": {"tune": [{"greentrainer": GREEN}]},
    "promot": {"tune": [*BESIDE["promot"]["tune"], HALF]},
    "caft": {**BESIDE["caft"], "tune": [HALF]},
}
"""The keys of a run in which a technique has phases, or changes what trains."""
ALIKE = ("spiel", "lift", "greentrainer")
"""Those without phases: every state is as good as the last."""
PAIRS = [(name, beside) for name, beside in product(PHASED, BESIDE) if name != beside]


def made(name: str, beside: str) -> Callable[[Clock], Engine]:
    """How a technique is attached beside another."""
    keys = {**PHASED[name], **BESIDE[beside], "tune": [*BESIDE[beside].get("tune", ()), *PHASED[name]["tune"]]}

    def make(clock: Clock) -> Engine:
        both = {"tune": keys["tune"], "objective": keys.get("objective", "cross_entropy")}
        return engine_of(model_of(), dtype=torch.bfloat16, now=clock.at(0, 0.0), **both)

    return make


def clock_of(run: Engine) -> Clock:
    return Clock(STEPS, 0.01, lambda progress: 1.0, 0, 0, run.tune.turns)


def own(run: Engine, name: str, ending: str = "") -> dict[str, Tensor]:
    return {key: one.master.detach() for key, one in run.tune.trained.items() if one.slot == name and key.endswith(ending)}


def _adalora(run: Engine, lived: Life, border: int) -> None:
    values = own(run, "adalora", ".values")
    assert sum(int((one != 0).sum()) for one in values.values()) == 2 * len(values)


def _loca(run: Engine, lived: Life, border: int) -> None:
    found = lived.at_step[border][0]
    places = {**own(run, "loca", ".rows"), **own(run, "loca", ".columns")}
    assert any(bool(one.any()) for one in places.values()), "no location was looked for"
    assert all(torch.equal(one, found[f"master {name}"]) for name, one in places.items()), "a location moved behind the search"


def _lofit(run: Engine, lived: Life, border: int) -> None:
    assert not own(run, "lofit", ".scale")
    offsets = own(run, "lofit", ".offset")
    assert sum(len(one) for one in offsets.values()) == round(0.5 * run.tune.parts.heads * run.tune.parts.blocks)
    assert any(bool(one.any()) for one in offsets.values())


def _lt_sft(run: Engine, lived: Life, border: int) -> None:
    mine = [one for one in run.tune.trained.values() if one.slot == "lt_sft"]
    moved = sum(int((run.tune.region(one.place) != base_of(run, one.place)).sum()) for one in mine if one.place is not None)
    numbers = sum(run.tune.region(one.place).numel() for one in mine if one.place is not None)
    assert {one.form for one in mine} == {"flat"} and 0 < moved <= int(0.02 * numbers)


def _entries(run: Engine, lived: Life, border: int) -> None:
    """As many entries as at the start, others than at the start; what left is the base again, or keeps what it learnt."""
    for one in (one for one in run.tune.trained.values() if one.slot in ("spiel", "lift")):
        assert one.place is not None and one.index is not None and len(one.index.unique()) == len(one.index)
        first = lived.at_step[1][0][f"index {one.name}"]
        assert len(first) == len(one.index)
        if one.slot == "spiel":
            outside = torch.ones(run.tune.region(one.place).numel(), dtype=torch.bool).index_fill(0, one.index, False)
            assert torch.equal(run.tune.region(one.place).reshape(-1)[outside], base_of(run, one.place).reshape(-1)[outside])
    indices = {key: value for key, value in lived.at_step[1][0].items() if key.startswith("index ")}
    assert any(not torch.equal(value, run.tune.trained[key.removeprefix("index ")].index) for key, value in indices.items())


def _greentrainer(run: Engine, lived: Life, border: int) -> None:
    """What was chosen trains, what was not stands still, in every step; choices cost what they may."""
    clock = clock_of(run)
    for step, before, after in _steps(lived):
        moves = run.tune.turns.alone(clock.at(step, 0.0)) is None
        wanted = {name for name in _names(before, MINE) if moves and before[_trains(name)]}
        assert _moved(before, after, MINE) == wanted, f"step {step}"
        assert before["state greentrainer backward share"] <= 0.7
    assert lived.at_step[STEPS][0]["state greentrainer selection"] == 2


MINE = "master greentrainer/"


def _trains(name: str) -> str:
    return f"state greentrainer trains {name.removeprefix(MINE)}"


def _in_turn(run: Engine, lived: Life, border: int) -> None:
    """While one trains alone nothing else moves; when it had its turn it stands still, and the model moves."""
    clock, turns = clock_of(run), run.tune.turns
    had: set[str] = set()
    for step, before, after in _steps(lived):
        alone, moved = turns.alone(clock.at(step, 0.0)), _moved(before, after, "master ")
        slots = {run.tune.trained[name.removeprefix("master ")].slot for name in moved}
        assert slots == {alone} if alone else (slots and not slots & had), f"step {step}"
        had |= {alone} if alone else set()
    assert had


def _steps(lived: Life) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Each step with targets but the first, with all numbers before and after it."""
    for step in range(1, STEPS):
        if step not in lived.idle and step + 1 in lived.at_step:
            yield step, lived.at_step[step][0], lived.at_step[step + 1][0]


def _names(found: Mapping[str, Any], beginning: str) -> set[str]:
    return {name for name in found if name.startswith(beginning)}


def _moved(before: Mapping[str, Any], after: Mapping[str, Any], beginning: str) -> set[str]:
    return {name for name in _names(before, beginning) & after.keys() if not torch.equal(before[name], after[name])}


ENDS: dict[str, Callable[[Engine, Life, int], None]] = {
    "adalora": _adalora,
    "loca": _loca,
    "lofit": _lofit,
    "lt_sft": _lt_sft,
    "spiel": _entries,
    "lift": _entries,
    "greentrainer": _greentrainer,
    "promot": _in_turn,
    "caft": _in_turn,
}


def base_of(run: Engine, place: Any) -> Tensor:
    """The values at a place before anything trained."""
    base = model_of().to(torch.bfloat16)
    values = base.get_parameter(place.parameter).data
    return values if place.start is None else values[place.start : place.stop]


def borders_of(name: str, beside: str) -> tuple[int, ...]:
    """The steps with which something about a technique changes, where it is alone or beside another."""
    run = made(name, beside)(Clock(STEPS, 0.01, lambda progress: 1.0, 0, 0))
    turns, clock = run.tune.turns, clock_of(run)
    found = set(turns.borders(STEPS))
    if name in ALIKE:
        moving = [step for step in range(STEPS) if turns.moves(name, clock.at(step, 0.0))]
        found |= {moving[place] for place in CHANGES[name] if place < len(moving)}
    return tuple(sorted(found))


CHANGES = {"spiel": (2, 4, 6, 8), "lift": (3, 6, 9), "greentrainer": (4, 8)}
"""Steps of its own with which one without phases changes what trains, or begins to look."""


@pytest.mark.parametrize(("name", "beside"), PAIRS)
def test_the_end_is_what_the_card_says(tmp_path: Path, name: str, beside: str) -> None:
    """A run with `best`, whose state of the lowest loss lies before the last border, without targets in the step before every border,
    killed at every border: it ends with the bits of one that nobody killed, in a state that the card describes."""
    borders = borders_of(name, beside)
    idle = [border - 1 for border in borders]
    rising = -1.0 if name in ALIKE else 1.0
    curve = {step: rising * step for step in range(1, STEPS + 1)}
    plain = Life(made(name, beside), rows_of_eight(), tmp_path / "plain", STEPS, idle, Plans())
    ended = plain.process()
    assert ended is not None
    ENDS[name](ended[0], plain, borders[-1])
    plans = Plans(save_every=1, evaluate_every=1, best="set")
    hard = Life(plain.make, rows_of_eight(), tmp_path / "hard", STEPS, idle, plans, curve)
    for border in borders:
        assert hard.process(("told", border)) is None and hard.process(("saved", border)) is None
    again = hard.process()
    assert again is not None
    run, progress = again
    assert_equal(hard.at_end, plain.at_end)
    best = min(hard.counted, key=lambda step: curve[step])
    assert progress.best == curve[best] and best > max(run.tune.turns.borders(STEPS), default=0)
    assert_best(everything(run), hard.at_step[best][0])
    ENDS[name](run, hard, borders[-1])


@pytest.mark.parametrize("name", PHASED)
def test_an_early_stop_comes_in_the_last_phase(tmp_path: Path, name: str) -> None:
    """Going back to the start of a phase looked like no improvement: the run ended before its last phase, with what it had before."""
    plans = Plans(evaluate_every=1, best="set", patience=2)
    curve = {step: float(step) for step in range(1, STEPS + 1)}
    lived = Life(made(name, "alone"), rows_of_eight(), tmp_path, STEPS, (), plans, curve)
    ended = lived.process()
    assert ended is not None
    run, progress = ended
    assert progress.step == lived.counted[0] + 2 and progress.stopped
    if name not in ALIKE:
        ENDS[name](run, lived, max(borders_of(name, "alone")))
