"""CoBa: scores by hand, its floor and cap, weights that follow the measured losses, and the rows it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import luthier
from luthier.errors import LuthierError
from luthier.kinds import Batch, Now
from luthier.methods.token_weight.convergence_balance import convergence_balance, floored, slopes, task_weights
from luthier.recipe.paths import with_paths
from luthier.training.services import RunServices
from tests.conftest import calibration, split
from tests.steps import TUNES, Given, assert_trains, step_on
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight

NAME = "convergence_balance"


def weight(**options: Any) -> dict[str, Any]:
    return {NAME: {"validation_source": "other", "validation_rows": 8, "every": 1, "window": 2, **options}}


def fp64(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_scores_by_hand() -> None:
    """Task 1 slows down: relative scores (0.6608, 0.3392), absolute (0.4174, 0.5826), divergence factor 0.0689."""
    slope_SK, largest_S = fp64([-0.2, -0.2], [-0.1, -0.2]), fp64(-0.2, -0.1)
    relative, absolute = fp64(-2 / 3, -4 / 3).softmax(0), fp64(2 / 3, 1.0).softmax(0)
    assert relative.tolist() == pytest.approx([0.6608, 0.3392], abs=1e-4)
    assert absolute.tolist() == pytest.approx([0.4174, 0.5826], abs=1e-4)
    divergence = 2 * float(fp64(20 / 3, 10 / 3).softmax(0)[1])
    assert divergence == pytest.approx(0.0689, abs=1e-4)
    found = task_weights(slope_SK, largest_S, 2, 5.0)
    assert found.tolist() == pytest.approx([0.4346, 0.5654], abs=1e-4)
    wanted = (2 * (divergence * relative + (1 - divergence) * absolute)).softmax(0)
    assert torch.allclose(found, wanted, atol=1e-15)


def test_the_divergence_factor_is_capped_at_one() -> None:
    """The worst task speeds up: without the cap, relative scores would count more than once."""
    slope_SK, largest_S = fp64([-0.1, -0.2], [-0.3, -0.2]), fp64(-0.1, -0.3)
    assert 2 * float(fp64(2.5, 7.5).softmax(0)[1]) > 1.9
    relative = (2 * fp64(-0.3, -0.2) / 0.5).softmax(0)
    assert torch.allclose(task_weights(slope_SK, largest_S, 2, 5.0), (2 * relative).softmax(0), atol=1e-15)
    # At the first slopes there is no history: relative scores alone.
    assert torch.allclose(task_weights(slope_SK[1:], largest_S[1:], 2, 5.0), (2 * relative).softmax(0), atol=1e-15)


def test_a_task_that_turns_up_is_held_back() -> None:
    slope_SK = fp64(*[[-0.2, -0.2]] * 4, [0.3, -0.2])
    found = task_weights(slope_SK, fp64(*[-0.2] * 4, 0.3), 5, 5.0)
    assert found[0] < 0.2 < 0.8 < found[1] and float(found.sum()) == pytest.approx(1.0)


def test_absolute_scores_look_at_the_last_slopes_alone() -> None:
    recent, largest = fp64([-0.2, -0.2], [-0.1, -0.2]), fp64(-0.3, -0.2, -0.1)
    before = [task_weights(torch.cat([first, recent]), largest, 2, 5.0) for first in (fp64([-9.0, -0.1]), fp64([-0.1, -9.0]))]
    assert torch.equal(before[0], before[1])


def test_losses_that_stand_still_weigh_alike() -> None:
    found = task_weights(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 2, 5.0)
    assert found.tolist() == [0.25] * 4


def test_slopes_are_those_of_least_squares() -> None:
    value_EK = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = slopes(value_EK, 4)
    x = torch.stack([torch.arange(4.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)], 1)
    for step in range(4):
        assert torch.allclose(found[step], torch.linalg.lstsq(x, value_EK[step : step + 4]).solution[0], atol=1e-12)
    assert slopes(fp64([1.0], [0.5]), 2).tolist() == [[-0.5]]


def test_the_floor() -> None:
    assert floored(fp64(0.4, 0.6)).tolist() == [0.4, 0.6]
    assert floored(fp64(0.05, 0.95)).tolist() == [0.05, 0.95], "a twentieth is not below the floor"
    assert floored(fp64(0.04, 0.96)).tolist() == pytest.approx([0.04 * 0.9 + 0.05, 0.96 * 0.9 + 0.05])
    assert float(floored(fp64(0.04, 0.96)).sum()) == pytest.approx(1.0)


def measured(run: Any, now: Now) -> list[float]:
    """Mean losses of the validation rows' tasks in order of their names, over all batches at once."""
    sums: dict[str, list[Tensor]] = {}
    for batch in calibration(8, "other"):
        view = RunServices(run.tune, "any", now).forward(batch, ["nll"])
        for row, nll in zip(view.row_N.tolist(), view["nll"], strict=True):
            sums.setdefault(batch.texts["task"][row], []).append(nll)
    return [float(torch.stack(sums[name]).mean()) for name in sorted(sums)]


def test_weights_follow_the_measured_losses(engine: Any, now: Now) -> None:
    run = engine(token_weight=weight(every=2, window=3), model=model_of())
    batch, state, losses, seen = rows_of_eight(), run.states[NAME], [], []
    losses.append(measured(run, now))
    for step in range(9):
        result = run.step(split(batch, (5, 3)), now._replace(step=step))
        seen.append([result.notes[f"{NAME} {task}"] for task in ("chat", "code", "math")])
        if step % 2:
            losses.append(measured(run, now))
    assert json.loads(state["tasks"]) == ["chat", "code", "math"]
    assert torch.allclose(state["losses"], fp64(*losses), atol=1e-12)
    assert seen[:4] == [pytest.approx([1 / 3] * 3)] * 4, "uniform until there are three values"
    ratio_EK = fp64(*losses) / fp64(losses[0])
    for step, weights in enumerate(seen[4:], start=4):
        known = ratio_EK[: 1 + step // 2]
        largest = slopes(known.max(1, keepdim=True).values, 3)[:, 0]
        assert weights == pytest.approx(floored(task_weights(slopes(known, 3), largest, 3, 5.0)).tolist(), abs=1e-9)
    assert max(seen[-1]) > 1 / 3 + 1e-3


def test_weights_are_applied_as_task_balance_does() -> None:
    rows = {"a": Given([1.0, 2.0], {"task": "a"}), "b": Given([5.0], {"task": "b"})}
    state = {"tasks": json.dumps(["a", "b", "c"]), "weights": fp64(0.2, 0.3, 0.5), "losses": fp64([1.0, 1.0, 1.0])}
    found = step_on(rows, weight(), state=state)
    assert found.loss == pytest.approx((0.2 * 1.5 + 0.3 * 5.0) / 0.5, abs=1e-12) and found.passes == 0


def test_reduces_to_task_balance_before_there_are_enough_values(engine: Any, now: Now) -> None:
    for by in ("tokens", "rows"):
        found = []
        for one in (weight(window=9, by=by), {"task_balance": {"by": by}}):
            run = engine(token_weight=one, model=model_of())
            for step in range(3):
                run.step([rows_of_eight()], now._replace(step=step))
            found.append(gradients(run, [rows_of_eight()], now._replace(step=3)))
        assert gap(found[0], found[1]) < 1e-12


@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_trains_with(engine: Any, now: Now, tune: Any) -> None:
    assert_trains(engine, now, tune=tune, token_weight=weight())


def no_task(rows: int, source: str) -> list[Batch]:
    return [batch._replace(texts={}) for batch in calibration(rows, source)]


def no_targets(rows: int, source: str) -> list[Batch]:
    return [batch._replace(label_BT=torch.full_like(batch.label_BT, -100)) for batch in calibration(rows, source)]


def test_rows_that_cannot_be_measured_are_refused_before_training(engine: Any, now: Now) -> None:
    with pytest.raises(LuthierError, match="the row `row100` has no `task`"):
        engine(token_weight=weight(), calibration=no_task)
    with pytest.raises(LuthierError, match="the validation rows have no labels"):
        engine(token_weight=weight(), calibration=no_targets)
    with pytest.raises(LuthierError, match="a task that is none of chat, code"):
        engine(token_weight=weight(validation_rows=2)).step([rows_of_eight()], now)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"validation_rows": 0}, "`validation_rows` is 0"),
        ({"every": 0}, "`every` is 0"),
        ({"window": 1}, "`window` is 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        convergence_balance(validation_source="other", **options)


def test_the_least_that_may_be_asked_for() -> None:
    """At a temperature of 0 the worst task's standstill is not noticed: relative scores alone."""
    for temperature in (0.0, 0.3):
        convergence_balance(validation_source="other", validation_rows=1, every=1, window=2, temperature=temperature)
    slope_SK, largest_S = fp64([-0.2, -0.2], [-0.1, -0.2]), fp64(-0.2, -0.1)
    relative = fp64(-2 / 3, -4 / 3).softmax(0)
    assert torch.allclose(task_weights(slope_SK, largest_S, 2, 0.0), (2 * relative).softmax(0), atol=1e-15)


ROWS = [{"prompt": f"Say {word}.", "completion": f"{word}!" * (1 + i), "task": "ab"[i % 2]} for i, word in enumerate("nopqrs")]


def test_a_run_from_a_recipe_and_its_validation_rows_beside_it(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, ROWS[:4])))
    options = {NAME: {"validation_source": "held.jsonl", "every": 1, "window": 2}}
    for spec in (options, [options]):
        found = with_paths({"token_weight": spec}, tmp_path)["token_weight"]
        found = found[0] if isinstance(found, list) else found
        assert found[NAME]["validation_source"] == str(tmp_path / "held.jsonl")
    recipe = {
        "model": "tiny:llama",
        "rows": {"train": ROWS},
        "token_weight": found,
        "out": str(tmp_path),
        "train": {"steps": 4, "batch_rows": 6, "micro_batch_tokens": 150, "precision": "fp32", "learning_rate": 1e-2},
    }
    run = luthier.train(recipe)
    notes = [line["notes"] for line in run.facts["history"]]
    assert notes[0] == {f"{NAME} a": 0.5, f"{NAME} b": 0.5}
    assert notes[3][f"{NAME} a"] != 0.5 and sum(notes[3].values()) == pytest.approx(1.0)
