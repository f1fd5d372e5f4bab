"""How a variant's learning rate is chosen: as many trials as every other variant, on the same grid around its own advised rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from luthier.errors import LuthierError
from luthier.lab.runner import Choice, Tried, best

RATIO = 3.0
"""Between one rate of the grid and the next."""
WIDER = 2
"""Rates that are added at an end of the grid where the best one lies there."""
_NAME = "learning_rate"


class Search(NamedTuple):
    """The trials of one variant, as Optuna holds them."""

    study: Any
    trials: Mapping[float, Any]
    """By learning rate, the smallest first."""


def rates_around(center: float, count: int) -> tuple[float, ...]:
    """The grid: `count` rates a factor of 3 apart, the advised one in their middle, to three digits.

    `rates_around(1e-3, 3)` is (3.33e-4, 1e-3, 3e-3).
    """
    return tuple(float(f"{center * RATIO ** (number - (count - 1) / 2):.3g}") for number in range(count))


def side_of(choice: Choice) -> int:
    """Where on its grid the chosen rate lies: -1 at the smallest, 1 at the largest, 0 between, or where there was no search."""
    rates = [one.rate for one in choice.tried]
    if choice.rate is None or len(rates) < 2:
        return 0
    return (choice.rate == max(rates)) - (choice.rate == min(rates))


def taught_nothing(choice: Choice, floor: float | None) -> bool:
    """Whether every rate that gave a score gave the same, and none better than the floor: then nothing was chosen.

    Args:
        choice: of a search.
        floor: the score of the model before training; None where it is not known.
    """
    scores = {one.score for one in choice.tried if one.score is not None}
    return len(scores) == 1 and floor is not None and max(scores) <= floor


def rates_beyond(center: float, count: int, side: int) -> tuple[float, ...]:
    """The rates by which a grid of `rates_around` grows at its largest (1) or smallest (-1) rate; none for 0.

    They are those of the grid with `2 * WIDER` rates more, so that a search over that one finds them done.
    """
    wider = rates_around(center, count + 2 * WIDER)
    return wider[-WIDER:] if side > 0 else wider[:WIDER] if side < 0 else ()


def begin(rates: Sequence[float]) -> Search:
    """Plan one trial for each rate.

    Raises:
        LuthierError: Optuna is not installed.
    """
    optuna = find_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    choices = {_NAME: optuna.distributions.CategoricalDistribution(sorted(rates))}
    trials = {}
    for rate in sorted(rates):
        study.enqueue_trial({_NAME: rate})
        trials[rate] = study.ask(fixed_distributions=choices)
    return Search(study, trials)


def choose(search: Search, scores: Mapping[float, float | None], losses: Mapping[float, float]) -> Choice:
    """The rate with the largest score; of equal ones that with the smallest loss, else the smallest.

    Args:
        search: from `begin`.
        scores: of every rate, larger is better; None where a run gave none, which is worse than any score.
        losses: of the rates where one was measured.

    Returns:
        The choice, with a note where it lies at an end of the grid; without a rate where no run gave a score.
    """
    failed = find_optuna().trial.TrialState.FAIL
    for rate, trial in search.trials.items():
        score = scores[rate]
        search.study.tell(trial, score, state=failed if score is None else None)
    tried = tuple(Tried(trial.params[_NAME], trial.value) for trial in search.study.trials)
    choice = best(tried, losses)
    return choice if any(one.score is not None for one in tried) else Choice(None, tried, "no learning rate gave a score")


def find_optuna() -> Any:
    """The module.

    Raises:
        LuthierError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise LuthierError(
            f"Optuna, which searches learning rates, is not installed ({error})",
            where="luthier sweep",
            fix='pip install "luthier[sweep]", or use learning_rates=1',
        ) from error
    return optuna
