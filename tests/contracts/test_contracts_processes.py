"""One process and two take the same steps, with every technique, also when one of them has no rows or no targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.contracts.combinations import traits
from tests.contracts.fixtures import RUNS
from tests.contracts.pair import Told, perform, shares, standing
from tests.toys.helpers import toys  # noqa: F401

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"optimizer": ["clip", "adamw"]},
    "entries": {"tune": "some_entries", "optimizer": "adamw"},
    "growing": {"tune": "growing", "optimizer": "adamw"},
    "look": {"token_weight": "drop_easiest"},
    "rows and tokens of the step": {"token_weight": {"q_tuning": {"rows": 0.6}}},
    "tasks": {"token_weight": {"task_balance": {"by": "rows"}}},
    "tasks by their probability": {"token_weight": "task_focal"},
    "tasks by their losses": {"token_weight": {"convergence_balance": {"validation_source": "other", "every": 1, "window": 2}}},
    "attention and an earlier state": {
        "tune": "lora",
        "token_weight": {"sstoken": {"attention_only": 0.25, "every": 2, "average": 0.9}},
    },
    "reference": {"token_weight": "beats_reference"},
    "penalty": {"objective": ["cross_entropy", {"pull_to_start": {"weight": 1.0}}, "extra_head"]},
    "masked inputs": {"objective": ["cross_entropy", {"masked_thought": {"warmup": 0.5}}, "drop_tokens"]},
    "heads ahead": {"objective": {"caft": {"heads_first": 0.25, "head_learning_rate_factor": 1.0}}},
    "zeroth order": {"gradient_estimator": "zeroth_order"},
}
TASKS: dict[str, dict[str, Any]] = {
    **{name: {"id": name, "keys": keys} for name, keys in SETTINGS.items()},
    **{f"{kind} {name}": {"id": f"{kind} {name}", "kind": kind, "name": name} for kind, name in RUNS},
}
APART = ("start", "later", "still")
"""When each process makes a choice of its own."""
PER_PROCESS = {("gradient_estimator", "per_layer")}
"""Techniques that several processes refuse: what takes its steps within backward knows of its own process alone."""


def assert_same(one: Told, first: Told, second: Told) -> None:
    """Both processes end with the same bits, and with the numbers of one process alone."""
    assert not one.refused and not first.refused and not second.refused, first.refused or second.refused or one.refused
    assert one.found.keys() == first.found.keys() == second.found.keys()
    for name, value in one.found.items():
        assert numpy.array_equal(first.found[name], second.found[name], equal_nan=_is_float(value)), name
        if isinstance(value, numpy.ndarray):
            assert value.shape == first.found[name].shape, name
            assert numpy.allclose(first.found[name], value, rtol=1e-9, atol=1e-10, equal_nan=True), name
        elif isinstance(value, float):
            assert first.found[name] == pytest.approx(value, rel=1e-9, abs=1e-10, nan_ok=True), name
        else:
            assert first.found[name] == value, name


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, numpy.ndarray) and value.dtype.kind == "f")


def test_faults_2_and_4_two_processes_equal_one(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """Fault 2: gradients, observed ones, growth, rules over the step, states and losses agree with one process, for every technique.
    Fault 4: where a loss is no number in one process, none is left waiting, each names the rows of the one, and nothing moved."""
    with standing(tmp_path) as pair:
        for task in TASKS.values():
            pair.give(task)
        pair.give({"id": "broken", "breaks": True})
        for when in APART:
            pair.give({"id": when, "apart": when})
        for name, task in TASKS.items():
            one = perform(task)
            first, second = pair.ask(name)
            with subtests.test(msg=name):
                if (task.get("kind"), task.get("name")) in PER_PROCESS:
                    words = "updates inside backward are not summed over several processes"
                    assert all(words in told.refused and told.fix for told in (first, second)) and not one.refused
                    continue
                assert_same(one, first, second)
        for when in APART:
            with subtests.test(msg=f"choices that differ: {when}"):
                for told in pair.ask(when):
                    assert "`own`" in told.refused and "differ" in told.refused and told.fix
        with subtests.test(msg="a loss that is no number"):
            rows = [row for batch in shares(0)[1] for row in batch.row_ids]
            for told in pair.ask("broken"):
                assert told.found["what"].startswith("the loss is not a finite number")
                assert told.found["where"] == f"rows {', '.join(rows)}" and told.found["same"]


def test_what_applies_itself_is_what_is_refused() -> None:
    assert {one for one in RUNS if "one at a time" in traits[one]} - {("gradient_estimator", "zeroth_order")} == PER_PROCESS
