"""Runs too short for their phases, phases in which nothing trains, and bases that are no longer there when they are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.errors import LuthierError
from luthier.kinds import Now, TokenWeight
from luthier.planning.plan import make_plan
from luthier.recipe import make_recipe
from luthier.recipe.reading import differences
from luthier.registry import Part
from tests.faults.runs import recipe
from tests.toys.helpers import model_of, rows_of_eight

ASKED = {"asked": {"rows": [{"prompt": "What is the color of the well?", "completion": "The well is pink."}], "metric": "loss"}}


@pytest.mark.parametrize(
    "keys",
    [{"tune": "lt_sft"}, {"tune": ["promot", "lora"]}, {"tune": "lora", "objective": {"caft": {"heads": 1, "heads_first": 0.5}}}],
    ids=["lt_sft", "promot", "caft"],
)
def test_one_step_is_too_short_for_two_phases(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Runs of a single step alone were not looked at: a phase was left out, or all that was learnt was taken back, without a word."""
    with pytest.raises(LuthierError, match="a run of 1 steps has 1 for"):
        make_plan(make_recipe(recipe(tmp_path, train={"steps": 1}, **keys)))
    make_plan(make_recipe(recipe(tmp_path, train={"steps": 2}, **keys)))


def test_a_phase_in_which_nothing_trains_is_refused(tmp_path: Path) -> None:
    """A prompt that stands still behind its own phase left half of the run to nothing, which logged losses all the same."""
    with pytest.raises(LuthierError, match="nothing trains in steps 4 to 6"):
        make_plan(make_recipe(recipe(tmp_path, tune={"promot": {"length": 2}})))
    make_plan(make_recipe(recipe(tmp_path, tune={"promot": {"length": 2, "share": 1.0}})))


def test_a_base_is_measured_beside_blocks_that_start_anew(tmp_path: Path) -> None:
    """Numbers that begin as others than the base's lost them, and measuring the base failed with a key that no recipe has."""
    found = luthier.train(recipe(tmp_path, tune="reinitialized_top", evaluate=ASKED, train={"steps": 2}))
    plain = luthier.train(recipe(tmp_path, tune="half", evaluate=ASKED, train={"steps": 2}))
    assert found.metrics["asked"]["before"] == plain.metrics["asked"]["before"]


def test_how_often_a_run_is_saved_may_change_when_it_goes_on() -> None:
    """The advice for a full disk, to keep fewer checkpoints and to train on, was refused as another recipe."""
    one = {"train": {"steps": 6, "save_every": 1, "keep_checkpoints": 3}}
    assert not differences(one, {"train": {"steps": 6, "save_every": 4, "keep_checkpoints": 1}})
    assert differences(one, {"train": {"steps": 5, "save_every": 1, "keep_checkpoints": 3}})


@pytest.mark.parametrize(
    ("steps", "options"),
    [(5, {"final": 0.3}), (9, {"final": 0.5}), (8, {"every": 3}), (6, {"final": 0.0}), (8, {"every": 100, "final": 0.4})],
    ids=str,
)
def test_the_best_of_a_run_with_a_budget_is_a_state_within_it(engine: Any, now: Now, steps: int, options: dict[str, Any]) -> None:
    """By rounding, by pruning seldom or without a final phase, states with too many triplets counted as the best, and were pruned behind
    their measurement."""
    run = engine(
        {"adalora": {"initial_rank": 3, "target_rank": 1, "warmup": 0.1, **options}}, model=model_of(layers=1), optimizer="adamw"
    )
    counted = [step for step in range(1, steps + 1) if all(step > border for border in run.tune.turns.borders(steps))]
    assert counted and counted != [*range(1, steps + 1)]
    for step in range(steps):
        run.step([rows_of_eight()], now._replace(step=step, steps=steps))
        values = [one.master for name, one in run.tune.trained.items() if name.endswith(".values")]
        kept = sum(int((value != 0).sum()) for value in values)
        assert step + 1 not in counted or kept <= len(values), f"behind step {step + 1}"


def test_tensors_are_chosen_again_on_time_where_a_step_has_no_rows(engine: Any, now: Now) -> None:
    """Two steps without rows at a border: the tensors that were to be chosen there were chosen a step too late, and one choice fell out."""
    quiet = Part("none", "token_weight", {}, (TokenWeight(look=lambda table: table["nll"] * 0.0, columns=("nll",)),))
    options = {"greentrainer": {"target": 0.7, "selections": 3, "target_modules": ["mlp_down", "attention"]}}
    run = engine(options, model=model_of(layers=1), token_weight=[quiet])
    chosen = []
    for step in range(8):
        run.step([rows_of_eight()], now._replace(step=step, steps=8))
        chosen.append(run.states["greentrainer"]["selection"])
    assert chosen == [0, 0, 1, 1, 2, 2, 2, 2]
