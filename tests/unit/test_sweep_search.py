"""How a sweep chooses learning rates: the grid, the trials, ties, ends, failures."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from luthier.errors import LuthierError
from luthier.lab.runner import Choice
from luthier.sweep.facts import floor_of, loss_of, score_of
from luthier.sweep.runs import Outcome
from luthier.sweep.search import begin, choose, rates_around, rates_beyond, side_of, taught_nothing


@pytest.mark.parametrize(
    ("center", "count", "rates"),
    [
        (1e-3, 3, (3.33e-4, 1e-3, 3e-3)),
        (2e-4, 3, (6.67e-5, 2e-4, 6e-4)),
        (9e-4, 5, (1e-4, 3e-4, 9e-4, 2.7e-3, 8.1e-3)),
        (3e-3, 2, (1.73e-3, 5.2e-3)),
        (1e-3, 1, (1e-3,)),
    ],
)
def test_the_grid_lies_around_the_advised_rate(center: float, count: int, rates: tuple[float, ...]) -> None:
    assert rates_around(center, count) == rates


def found(scores: dict[float, float | None], losses: dict[float, float] | None = None) -> tuple[float | None, str]:
    choice = choose(begin(list(scores)), scores, losses or {})
    assert {one.rate: one.score for one in choice.tried} == scores
    return choice.rate, choice.note


def test_the_best_rate_wins_and_of_equal_ones_the_smallest() -> None:
    assert found({1e-4: 0.1, 3e-4: 0.7, 9e-4: 0.5}) == (3e-4, "")
    assert found({1e-4: 0.1, 3e-4: 0.7, 9e-4: 0.7, 2.7e-3: 0.2}) == (3e-4, "")
    assert found({3e-4: -2.5, 9e-4: -2.0, 2.7e-3: -9.0}) == (9e-4, ""), "of losses the smallest, which are negated"


def test_a_loss_decides_between_equal_scores_alone() -> None:
    assert found({1e-4: 0.0, 3e-4: 0.0, 9e-4: 0.0}, {1e-4: 3.0, 3e-4: 2.0, 9e-4: 2.5}) == (3e-4, "")
    assert found({1e-4: 0.0, 3e-4: 0.0, 9e-4: 0.0}, {9e-4: 2.5})[0] == 9e-4
    assert found({1e-4: 0.0, 3e-4: 0.5, 9e-4: 0.1}, {1e-4: 0.1, 3e-4: 9.0})[0] == 3e-4


@pytest.mark.parametrize(
    ("scores", "side"),
    [((0.1, 0.2, 0.3), 1), ((0.3, 0.2, 0.1), -1), ((0.1, 0.3, 0.2), 0), ((None, None, None), 0), ((None, 0.1, None), 0)],
)
def test_which_end_of_the_grid_was_chosen(scores: tuple[float | None, ...], side: int) -> None:
    rates = (1e-4, 3e-4, 9e-4)
    assert side_of(choose(begin(rates), dict(zip(rates, scores, strict=True)), {})) == side
    assert side_of(Choice(1e-4)) == 0


def test_a_grid_grows_by_the_rates_of_a_wider_one() -> None:
    assert rates_beyond(1e-3, 3, 1) == (9e-3, 2.7e-2) and rates_beyond(1e-3, 3, -1) == (3.7e-5, 1.11e-4)
    assert rates_beyond(1e-3, 3, 0) == ()
    assert (*rates_beyond(1e-3, 3, -1), *rates_around(1e-3, 3), *rates_beyond(1e-3, 3, 1)) == rates_around(1e-3, 7)


@pytest.mark.parametrize(
    ("scores", "floor", "nothing"),
    [
        ((0.0, 0.0, 0.0), 0.0, True),
        ((0.0, 0.0, None), 0.0, True),
        ((0.0, 0.0, 0.0), 0.25, True),
        ((0.0, 0.0, 0.1), 0.25, False),
        ((0.5, 0.5, 0.5), 0.25, False),
        ((0.0, 0.0, 0.0), None, False),
        ((None, None, None), 0.0, False),
    ],
)
def test_rates_that_all_taught_nothing(scores: tuple[float | None, ...], floor: float | None, nothing: bool) -> None:
    rates = (1e-4, 3e-4, 9e-4)
    assert taught_nothing(choose(begin(rates), dict(zip(rates, scores, strict=True)), {}), floor) is nothing


def test_a_choice_at_an_end_of_the_grid_says_so() -> None:
    assert found({1e-4: 0.1, 3e-4: 0.2, 9e-4: 0.3}) == (9e-4, "the chosen rate 0.0009 is the largest that was tried")
    assert found({1e-4: 0.3, 3e-4: 0.3, 9e-4: 0.3}) == (1e-4, "the chosen rate 0.0001 is the smallest that was tried")


def test_a_rate_that_gave_no_score_is_worse_than_any() -> None:
    assert found({1e-4: -5.0, 3e-4: -9.0, 9e-4: None}) == (1e-4, "the chosen rate 0.0001 is the smallest that was tried")
    assert found({1e-4: None, 3e-4: None}) == (None, "no learning rate gave a score")


def test_optuna_holds_every_trial() -> None:
    search = begin([3e-3, 1e-3])
    choose(search, {1e-3: 0.5, 3e-3: None}, {})
    assert [(one.params, one.value, one.state.name) for one in search.study.trials] == [
        ({"learning_rate": 1e-3}, 0.5, "COMPLETE"),
        ({"learning_rate": 3e-3}, None, "FAIL"),
    ]


def test_scores_are_larger_where_the_value_is_better() -> None:
    def outcome(**entry: Any) -> Outcome:
        return Outcome({"metrics": {"new": entry}})

    assert score_of(outcome(after=0.25, higher_is_better=True), "new") == 0.25
    assert score_of(outcome(after=12.5, higher_is_better=False), "new") == -12.5
    assert score_of(outcome(after=None), "new") is None
    assert score_of(outcome(after=0.25), "other") is None
    assert score_of(Outcome(None, {"error": "broke off"}), "new") is None
    assert floor_of(outcome(before=0.25, higher_is_better=True), "new") == 0.25
    assert floor_of(outcome(before=12.5, higher_is_better=False), "new") == -12.5 and floor_of(outcome(after=1.0), "new") is None


def test_the_loss_that_decides_is_that_of_another_target() -> None:
    sets = {
        "new": {"metric": "loss", "role": "target", "after": 1.0},
        "prose": {"metric": "perplexity", "role": "retention", "after": 2.0},
        "other": {"metric": "equal", "role": "target", "after": 3.0},
        "taught": {"metric": "loss", "role": "target", "after": 4.0},
    }
    assert loss_of(Outcome({"metrics": sets}), "new") == 4.0
    assert loss_of(Outcome({"metrics": sets}), "taught") == 1.0
    assert loss_of(Outcome({"metrics": {"new": sets["new"], "prose": sets["prose"]}}), "new") is None


def test_without_optuna_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(LuthierError, match="Optuna") as told:
        begin([1e-3])
    assert "luthier[sweep]" in told.value.fix and "learning_rates=1" in told.value.fix
