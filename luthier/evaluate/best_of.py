"""Best of n: what a reward picks among answers that were written beforehand, what that is worth, and how far it goes from the model.

Shapes: M answers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy

from luthier.errors import LuthierError
from luthier.evaluate.intervals import FEWEST, Interval, bootstrap


class Picked(NamedTuple):
    """What the best of n answers by a reward comes to, a mean over rows. Intervals cover 95 %; None where there are too few rows, or
    all are alike."""

    n: int
    kl: float
    """The most that picking takes answers from the model that wrote them, see `kl_bound`."""
    reward: float
    reward_interval: Interval | None
    gold: float | None
    """What the picked answers are worth; None where nothing tells it."""
    gold_interval: Interval | None
    disagreement: float | None
    """Of the picked answers, the standard deviation of the members' scores; None where there is one member."""


class BestOf(NamedTuple):
    """What picking the best of n answers by a reward comes to, for growing n."""

    rows: int
    answers: int
    """The fewest of a row."""
    members: int
    combine: str
    gold: str | None
    picked: tuple[Picked, ...]

    @property
    def peak(self) -> int | None:
        """The n at which gold is highest, of equals the smallest; None where nothing tells gold, or it is the same at all."""
        told = [one for one in self.picked if one.gold is not None]
        return max(told, key=lambda one: (one.gold, -one.n)).n if len({one.gold for one in told}) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**self._asdict(), "picked": [one._asdict() for one in self.picked], "peak": self.peak}


def chances(score_M: Sequence[float], n: int) -> list[float]:
    """The chance of each answer to be the best of n that are drawn from all without replacement; equals share theirs.

    A mean with these weights is what the best of n answers of the model is worth, without bias: it is the mean over all choices of n of the
    M answers, where taking the first n would be one of them.

    Args:
        score_M: by which answers are compared; the highest is picked.
        n: how many are drawn, 1 to M.

    Raises:
        LuthierError: there are fewer answers.
    """
    if not 1 <= n <= len(score_M):
        raise LuthierError(f"the best of {n} among {len(score_M)} answers", fix=f"ask for 1 to {len(score_M)}")
    found, below = [0.0] * len(score_M), 0
    for _, alike in groupby(sorted(range(len(score_M)), key=score_M.__getitem__), key=score_M.__getitem__):
        places = list(alike)
        # Whole numbers divide exactly, however many choices there are.
        wins = math.comb(below + len(places), n) - math.comb(below, n)
        for place in places:
            found[place] = wins / (len(places) * math.comb(len(score_M), n))
        below += len(places)
    return found


def kl_bound(n: int) -> float:
    """An upper bound of KL(best of n || the model) in nats, log n - (n - 1) / n; it is the divergence itself where no two of n answers ever
    have equal rewards, as with continuous ones (Beirami et al., 2024)."""
    return math.log(n) - (n - 1) / n


def best_of(
    reward_RM: Sequence[Sequence[float]],
    gold_RM: Sequence[Sequence[float]] | None = None,
    deviation_RM: Sequence[Sequence[float]] | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> list[Picked]:
    """What the best of n answers comes to, for several n.

    Args:
        reward_RM: of each row, a number for each of its answers, by which they are picked; rows may have unlike numbers of answers.
        gold_RM: what the answers are worth, in the same order.
        deviation_RM: how far the reward's members disagree about them.
        sizes: n; None: 1, 2, 4 ... and as many as every row has.

    Raises:
        LuthierError: a row has fewer answers than asked for.
    """
    most = min(map(len, reward_RM))
    sizes = sizes or [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
    found = []
    for n in sizes:
        chance_RM = [chances(reward_M, n) for reward_M in reward_RM]
        reward, reward_interval = _mean(chance_RM, reward_RM)
        gold, gold_interval = (None, None) if gold_RM is None else _mean(chance_RM, gold_RM)
        disagreement = None if deviation_RM is None else _mean(chance_RM, deviation_RM)[0]
        found.append(Picked(n, kl_bound(n), reward, reward_interval, gold, gold_interval, disagreement))
    return found


def _mean(chance_RM: Sequence[Sequence[float]], value_RM: Sequence[Sequence[float]]) -> tuple[float, Interval | None]:
    value_R = numpy.array(
        [
            math.fsum(chance * value for chance, value in zip(chance_M, value_M, strict=True))
            for chance_M, value_M in zip(chance_RM, value_RM, strict=True)
        ]
    )
    # Where all rows are alike resampling would claim certainty.
    enough = len(value_R) >= FEWEST and len(set(value_R.tolist())) > 1
    return float(value_R.mean()), bootstrap(value_R[None], numpy.ones(len(value_R)), lambda mean_MS: mean_MS[0]) if enough else None
