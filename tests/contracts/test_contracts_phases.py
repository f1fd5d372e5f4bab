"""What a technique with phases leaves at the end is what its card says: beside others that hold it still for a while, with steps without
targets at its borders, killed there and resumed, in a narrow type, and when the run goes back to its best state."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.training.engine import Engine
from luthier.training.loop import Clock, Plans
from tests.contracts.fixtures import engine_of
from tests.contracts.life import NEVER, Life, assert_best
from tests.toys.helpers import model_of, rows_of_eight, toys  # noqa: F401
from tests.unit.test_kinds_resume import assert_equal, everything

STEPS = 12
ATTENTION = ["attention"]
PHASED: dict[str, Any] = {
    "adalora": {"initial_rank": 3, "target_rank": 2, "warmup": 0.1, "final": 0.4, "roles": ATTENTION},
    "loca": {"coefficients": 6, "search": 0.5, "coefficient_steps": 1, "location_steps": 1, "roles": ATTENTION},
    "lofit": {"selection": 0.5, "share": 0.5},
    "lt_sft": {"share": 0.02, "roles": ATTENTION},
    "spiel": {"density": 0.005, "every": 4, "gather": 2, "roles": ATTENTION},
    "lift": {"rank": 2, "lora_rank": 1, "every": 3, "roles": ATTENTION},
}
"""Options with which phases, or changes of what trains, fit into so few steps."""
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "promot": {"tune": {"promot": {"length": 2, "share": 0.34}}},
    "caft": {"objective": {"caft": {"heads": 1, "heads_first": 0.25}}},
    "greentrainer": {"tune": {"greentrainer": {"roles": ["mlp_down"], "target": 0.7, "selections": 2}}},
}


def made(name: str, beside: str) -> Callable[[Clock], Engine]:
    """How a technique is attached beside another."""
    keys = BESIDE[beside]
    tune = [keys["tune"]] if "tune" in keys else []

    def make(clock: Clock) -> Engine:
        both = {"tune": [*tune, {name: PHASED[name]}], "objective": keys.get("objective", "cross_entropy")}
        return engine_of(model_of(), dtype=torch.bfloat16, now=clock.at(0, 0.0), **both)

    return make


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


ENDS: dict[str, Callable[[Engine, Life, int], None]] = {
    "adalora": _adalora,
    "loca": _loca,
    "lofit": _lofit,
    "lt_sft": _lt_sft,
    "spiel": _entries,
    "lift": _entries,
}


def base_of(run: Engine, place: Any) -> Tensor:
    """The values at a place before anything trained."""
    base = model_of().to(torch.bfloat16)
    values = base.get_parameter(place.parameter).data
    return values if place.start is None else values[place.start : place.stop]


def borders_of(name: str, beside: str) -> tuple[int, ...]:
    """The steps with which something about a technique changes, where it is alone or beside another."""
    run = made(name, beside)(Clock(STEPS, 0.01, lambda progress: 1.0, 0, 0))
    turns = run.tune.turns
    found = set(turns.borders(STEPS))
    if name in ("spiel", "lift"):
        moving = [step for step in range(STEPS) if turns.moves(name, Clock(STEPS, 0.01, lambda progress: 1.0, 0, 0).at(step, 0.0))]
        found |= {moving[place] for place in (PHASED[name]["every"], PHASED[name].get("gather", 0)) if place}
    return tuple(sorted(found))


@pytest.mark.parametrize(("name", "beside"), [*product(PHASED, BESIDE)])
def test_the_end_is_what_the_card_says(tmp_path: Path, name: str, beside: str) -> None:
    """A run with `best`, whose state of the lowest loss lies before the last border, without targets in the step before a border, killed
    at every border: it ends with the bits of one that nobody killed, in a state that the card describes."""
    borders = borders_of(name, beside)
    # Without phases every state is as good as the last.
    rising = -1.0 if name in ("spiel", "lift") else 1.0
    curve = {step: rising * step for step in range(1, STEPS + 1)}
    plain = Life(made(name, beside), rows_of_eight(), tmp_path / "plain", STEPS, borders[-1] - 1, Plans())
    ended = plain.process()
    assert ended is not None
    ENDS[name](ended[0], plain, borders[-1])
    plans = Plans(save_every=1, evaluate_every=1, best="set")
    hard = Life(plain.make, rows_of_eight(), tmp_path / "hard", STEPS, borders[-1] - 1, plans, curve)
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
    lived = Life(made(name, "alone"), rows_of_eight(), tmp_path, STEPS, NEVER, plans, curve)
    ended = lived.process()
    assert ended is not None
    run, progress = ended
    assert progress.step == lived.counted[0] + 2 and progress.stopped
    if name not in ("spiel", "lift"):
        ENDS[name](run, lived, max(borders_of(name, "alone")))


def _still(lived: Life, ending: str, border: int, run: Engine) -> bool:
    found = lived.at_step[border][0]
    mine = {name: one.master.detach() for name, one in run.tune.trained.items() if ending in name}
    assert mine
    return all(torch.equal(one, found[f"master {name}"]) for name, one in mine.items())


@pytest.mark.parametrize(
    ("keys", "ending"), [(BESIDE["promot"], ".promot_PD"), (BESIDE["caft"], ".ahead_")], ids=["promot", "caft"]
)
def test_what_trains_alone_first_stands_still_afterwards(tmp_path: Path, keys: dict[str, Any], ending: str) -> None:
    """The prompt, or the heads, learn before all else, and are then what they were; the model is the base until then."""

    def make(clock: Clock) -> Engine:
        tune = [keys["tune"], "half"] if "tune" in keys else ["half"]
        return engine_of(model_of(), now=clock.at(0, 0.0), tune=tune, objective=keys.get("objective", "cross_entropy"))

    border = 4 if "tune" in keys else 3
    lived = Life(make, rows_of_eight(), tmp_path, STEPS, border - 1, Plans())
    ended = lived.process()
    assert ended is not None and ended[0].tune.turns.borders(STEPS) == (border,)
    assert _still(lived, ending, border, ended[0])
    first, at_border, last = (lived.at_step[step][0] for step in (1, border, STEPS))
    halves = [key for key in first if key.startswith("master half/")]
    assert halves and all(torch.equal(first[key], at_border[key]) for key in halves)
    assert any(not torch.equal(last[key], at_border[key]) for key in halves)
    mine = [key for key in first if key.startswith("master ") and ending in key]
    assert any(not torch.equal(first[key], at_border[key]) for key in mine)
