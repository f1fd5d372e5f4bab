"""Losses of several tasks: the numbers of every case by hand, whatever the split, and what the rules become with one task."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Now, StepTable, TokenWeight
from luthier.registry import Part
from luthier.training import objective, rules
from tests.conftest import split
from tests.steps import TUNES, Given, assert_trains, step_on
from tests.toys.helpers import gap, gradients, model_of, rows_of_eight

CASE_2, CASE_3, CASE_4 = "row_balance", "task_balance", {"task_balance": {"by": "rows"}}
A, B = {"task": "a"}, {"task": "b"}


def test_a_large_task_and_a_small_one_by_hand() -> None:
    """90 targets at 1.0 and 10 at 3.0: 1.2 over all targets, 2.0 over tasks."""
    rows = {"a": Given([1.0] * 90, A), "b": Given([3.0] * 10, B)}
    assert step_on(rows, CASE_3).loss == pytest.approx(2.0, abs=1e-12)
    assert sum(sum(row.nll) for row in rows.values()) / 100 == pytest.approx(1.2)
    rows = {"a1": Given([1.0] * 10, A), "a2": Given([2.0] * 90, A), "b": Given([3.0] * 10, B)}
    for weight, wanted in ((CASE_2, 2.0), (CASE_3, 2.45), (CASE_4, 2.25)):
        assert step_on(rows, weight).loss == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("weight", [CASE_2, CASE_3, CASE_4])
def test_the_gradient_is_each_targets_share(weight: Any) -> None:
    rows = {"a1": Given([0.1, 2.0], A), "a2": Given([0.3, 0.4, 1.5, 3.0], A), "b": Given([0.7], B), "none": Given([], B)}
    wanted = {
        CASE_2: {"a1": 1 / 6, "a2": 1 / 12, "b": 1 / 3},
        CASE_3: {"a1": 1 / 12, "a2": 1 / 12, "b": 1 / 2},
        str(CASE_4): {"a1": 1 / 8, "a2": 1 / 16, "b": 1 / 2},
    }[weight if isinstance(weight, str) else str(weight)]
    found = step_on(rows, weight)
    for name, share in wanted.items():
        assert found.slopes[name] == pytest.approx([share] * len(rows[name].nll), abs=1e-15)
    assert sum(map(sum, found.slopes.values())) == pytest.approx(1.0), "the mean weight is 1"
    assert found.passes == 0


def test_copies_of_a_task_change_nothing() -> None:
    rows = {"a1": Given([0.5, 1.0, 4.0], A), "a2": Given([2.0], A), "b": Given([3.0, 0.1], B)}
    twice = {**rows, **{f"{name} again": row for name, row in rows.items() if name[0] == "a"}}
    for weight, same in ((CASE_3, True), (CASE_4, True), (CASE_2, False)):
        assert (step_on(twice, weight).loss == pytest.approx(step_on(rows, weight).loss, abs=1e-12)) is same


def test_weights_are_divided_by_those_of_the_tasks_that_are_there() -> None:
    b, weight = {"b": Given([3.0, 1.5], B)}, {"task_balance": {"weights": {"a": 1.0, "b": 3.0}}}
    assert step_on(b, weight).loss == pytest.approx(2.25, abs=1e-12)
    both = {**b, "a": Given([1.0], A)}
    assert step_on(both, weight).loss == pytest.approx((1.0 + 3 * 2.25) / 4, abs=1e-12)
    found = step_on(both, {"task_balance": {"weights": {"a": 1.0, "b": 0.0}}})
    assert found.loss == pytest.approx(1.0, abs=1e-12) and found.slopes.keys() == {"a"}, "a task without weight is not run"
    assert step_on(b, {"task_balance": {"weights": {"a": 1.0, "b": 0.0}}}).slopes == {}
    by_number = {"a": Given([1.0], {"task": 1}), "b": Given([3.0], {"task": 2.5})}
    assert step_on(by_number, {"task_balance": {"weights": {"1": 1.0, "2.5": 3.0}}}).loss == pytest.approx(2.5, abs=1e-12)


def test_tasks_named_by_large_numbers_and_by_numbers_and_texts() -> None:
    """Neighbors that fp32 cannot tell apart, fractions as they are written, and a step whose micro-batches have different kinds."""
    rows = {"a": Given([1.0] * 9, {"task": 20240100}), "b": Given([3.0], {"task": 20240101})}
    assert step_on(rows, CASE_3).loss == pytest.approx(2.0, abs=1e-12)
    tenth = {"a": Given([1.0], {"task": 0.1}), "b": Given([3.0], {"task": 7})}
    assert step_on(tenth, {"task_balance": {"weights": {"0.1": 3.0, "7": 1.0}}}).loss == pytest.approx(1.5, abs=1e-12)
    mixed = {"a1": Given([1.0], {"task": 1}), "b": Given([3.0], {"task": "b"}), "a2": Given([1.0] * 3, {"task": "1"})}
    for sizes in ((3,), (1, 2), (2, 1), (1, 1, 1)):
        assert step_on(mixed, CASE_3, sizes).loss == pytest.approx(2.0, abs=1e-12)


def test_a_rule_balances_what_the_rule_before_it_keeps() -> None:
    """The first keeps rows whose number is odd: task a is left with one row, and each task has half of the loss."""
    rows = {
        "a1": Given([1.0, 2.0], {**A, "number": 1}),
        "a2": Given([5.0] * 4, {**A, "number": 2}),
        "b": Given([4.0], {**B, "number": 3}),
    }
    for sizes in ((3,), (1, 2), (1, 1, 1)):
        found = step_on(rows, [Part("odd", "token_weight", {}, (TokenWeight(look=_odd),)), CASE_3], sizes)
        assert found.loss == pytest.approx((1.5 + 4.0) / 2, abs=1e-12) and found.slopes.keys() == {"a1", "b"}


def _odd(table: StepTable) -> Tensor:
    number_M = table.of_rows("number")
    assert number_M is not None
    return (number_M % 2).float()


def test_micro_batches_are_one_step() -> None:
    """A mean of the micro-batches' losses would be 2.0."""
    rows = {"a1": Given([2.0] * 30, A), "a2": Given([1.0] * 60, A), "b": Given([3.0] * 10, B)}
    for sizes in ((3,), (1, 2), (1, 1, 1)):
        assert step_on(rows, CASE_3, sizes).loss == pytest.approx(13 / 6, abs=1e-12)


def test_focal_by_hand() -> None:
    """Probabilities 0.3 and 0.8: weighed by 0.7^2 and 0.2^2."""
    rows = {"a": Given([-log(0.3)], A), "b": Given([-log(0.8)], B)}
    assert step_on(rows, {"task_focal": {"gamma": 0.0}}).loss == pytest.approx(0.713558, abs=1e-6)
    assert step_on(rows, {"task_focal": {"gamma": 2.0}}, (1, 1)).loss == pytest.approx(0.299436, abs=1e-6)
    # One target alone.
    assert step_on({"a": rows["a"]}, "task_focal").loss == pytest.approx(0.49 * -log(0.3), abs=1e-7)


def test_focal_means_over_rows_and_over_targets() -> None:
    rows = {"a1": Given([-log(0.5)], A), "a2": Given([-log(0.2), -log(0.4), -log(0.6)], A), "b": Given([-log(0.9)], B)}
    by_row = ((1 - (0.5 + 0.4) / 2) * (log(2) + sum(rows["a2"].nll) / 3) / 2 + 0.1 * -log(0.9)) / 2
    by_token = ((1 - 1.7 / 4) * (log(2) + sum(rows["a2"].nll)) / 4 + 0.1 * -log(0.9)) / 2
    assert step_on(rows, {"task_focal": {"gamma": 1.0}}).loss == pytest.approx(by_row, abs=1e-7)
    assert step_on(rows, {"task_focal": {"gamma": 1.0, "by": "tokens"}}).loss == pytest.approx(by_token, abs=1e-7)


def one_task(batch: Any) -> Any:
    return batch._replace(texts={"task": ("a",) * len(batch.row_ids)})


def test_one_task_reduces_to_plain_cross_entropy_and_to_rows(engine: Any, now: Now) -> None:
    batch = one_task(rows_of_eight())
    found = [
        gradients(engine(token_weight=weight, model=model_of()), [batch], now)
        for weight in (None, CASE_3, {"task_focal": {"gamma": 0.0, "by": "tokens"}}, CASE_2, CASE_4, {"task_focal": {"gamma": 0.0}})
    ]
    # The row without a target is not run, and other shapes round otherwise.
    assert gap(found[1], found[0]) < 1e-14 and gap(found[2], found[1]) == 0.0
    assert gap(found[4], found[3]) == 0.0 and gap(found[5], found[3]) == 0.0
    assert gap(found[3], found[0]) > 1e-3


def test_focal_reduces_to_task_balance(engine: Any, now: Now) -> None:
    for by in ("tokens", "rows"):
        weights = ({"task_balance": {"by": by}}, {"task_focal": {"gamma": 0.0, "by": by}})
        plain, none = (gradients(engine(token_weight=one, model=model_of()), [rows_of_eight()], now) for one in weights)
        assert gap(none, plain) < 1e-12


def test_rows_of_equal_length_reduce_row_balance_to_cross_entropy(engine: Any, now: Now) -> None:
    batch = rows_of_eight().take(torch.tensor([0, 2, 7]))
    label_BT = batch.label_BT.clone()
    for row in range(3):
        label_BT[row, label_BT[row].ge(0).nonzero()[2:, 0]] = -100
    batch = batch._replace(label_BT=label_BT)
    plain, none = (gradients(engine(token_weight=one, model=model_of()), [batch], now) for one in (None, CASE_2))
    assert gap(none, plain) == 0.0


def test_the_loss_of_a_real_step_is_the_mean_over_tasks(engine: Any, now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = objective.view_of
    for module in (objective, rules):
        monkeypatch.setattr(module, "view_of", lambda *given, **more: (calls.append(1), real(*given, **more))[1])
    batch = rows_of_eight()
    names = batch.texts["task"]
    each = []
    for task in sorted(set(names)):
        alone = batch.take(torch.tensor([i for i, name in enumerate(names) if name == task]))
        each.append(engine(model=model_of()).step([alone], now).nll)
    calls.clear()
    result = engine(token_weight=CASE_3, model=model_of()).step(split(batch, (5, 3)), now)
    assert len(calls) == 2, "a rule without columns costs no pass"
    assert result.loss == pytest.approx(sum(each) / len(each), rel=1e-12)
    assert result.kept == pytest.approx(1.0)


@pytest.mark.parametrize("weight", [CASE_2, CASE_3, "task_focal"])
@pytest.mark.parametrize("tune", TUNES, ids=str)
def test_trains_with(engine: Any, now: Now, tune: Any, weight: Any) -> None:
    assert_trains(engine, now, tune=tune, token_weight=weight)


@pytest.mark.parametrize(
    ("rows", "weight", "what"),
    [
        ({"a": Given([1.0])}, CASE_3, "a row of this step has no `task`"),
        ({"a": Given([1.0], A), "b": Given([1.0], {"task": ""})}, CASE_3, "has no `task`"),
        ({"a": Given([1.0], {"task": 1}), "b": Given([1.0])}, "task_focal", "has no `task`"),
        ({"a": Given([1.0], A)}, {"task_balance": {"column": "kind"}}, "has no `kind`"),
        ({"a": Given([1.0], A)}, {"task_balance": {"weights": {"b": 1.0, "c": 2.0}}}, "none of b, c"),
        ({}, {"task_balance": {"weights": {"b": -1.0}}}, "the weights are"),
        ({}, {"task_balance": {"weights": {"b": 0.0}}}, "the weights are"),
        ({}, {"task_balance": {"weights": {}}}, "the weights are"),
        ({}, {"task_focal": {"gamma": -1.0}}, "gamma is -1.0"),
    ],
)
def test_errors(rows: dict[str, Given], weight: Any, what: str) -> None:
    with pytest.raises(LuthierError, match=what):
        step_on(rows, weight)


@pytest.mark.parametrize("weight", [CASE_2, CASE_3, CASE_4, "task_focal", "q_tuning"])
def test_a_step_without_targets_is_no_mistake(weight: Any) -> None:
    assert step_on({"a": Given([]), "b": Given([])}, weight).slopes == {}
