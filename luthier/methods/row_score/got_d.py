"""GOT-D, gradients of optimal transport for data selection (Kang et al., 2024).

A model that is tuned a little behaves like one trained on a mix of its pre-training rows and the new ones. So the rows to add are not
those that look like the target, but those that move the whole closest to it: the direction in which the optimal transport cost between
pool and target falls fastest, with the pool standing in for the pre-training rows. B rows of the pool, K target rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import RowScore, RowServices
from luthier.registry import method
from luthier.rows.shapes import Row
from luthier.rows.texts import text_of

FIRST_ROUND = 50
MOST_ITERATIONS = 25_000


@method(
    title="GOT-D",
    paper="arXiv:2405.02774",
    row=10,
    needs=("target", "embed"),
    departs="the entropic dual, its strength and the size of chunks are luthier's choice; `divergence: sinkhorn` takes out the pull that "
    "entropy has towards lonely rows",
    replication="got_d",
)
def got_d(
    *,
    epsilon: float = 0.01,
    divergence: Literal["transport", "sinkhorn"] = "transport",
    chunk: int = 2000,
    tolerance: float = 1e-3,
) -> RowScore:
    """Choose the rows that move the pool closest to the target, by the gradient of optimal transport.

    Needs the extra `selection`. Rows that stand several times in the pool must stay in it: how often they do says how much of their
    kind there is already.

    Args:
        epsilon: strength of the entropic smoothing, as a share of the median distance; above 0.01 it favors lonely rows.
        divergence: `transport`, the cost itself, or `sinkhorn`, less half of what the pool costs against itself: then no row of a
            pool that equals its target stands out, at any epsilon.
        chunk: most rows of the pool that are solved together, each time against the whole target; chunks are drawn at random, and
            only then can their scores be compared.
        tolerance: the largest change of a score, as a share of the median distance, at which the solution counts as found.

    Raises:
        LuthierError: an option out of its range, POT is not installed, or no solution within 25,600 iterations.
    """
    for name, value, limit in (("epsilon", epsilon, 0), ("tolerance", tolerance, 0), ("chunk", chunk, 1)):
        if value <= limit:
            raise LuthierError(f"{name} is {value}", where=f"got_d: {name}", fix=f"use more than {limit}")

    def score(rows: Sequence[Row], services: RowServices) -> list[float]:
        embedding_BD = machine.widened(services.embed([text_of(row) for row in rows]))
        target_KD = machine.widened(services.embed([text_of(row) for row in services.target]))
        order_B = torch.randperm(len(rows), generator=services.rng("chunks"))
        score_B = torch.zeros(len(rows), dtype=torch.float64)
        unit = 0.0
        for picked in order_B.tensor_split(math.ceil(len(rows) / chunk)):
            pool_BD = embedding_BD[picked]
            cost_BK = torch.cdist(pool_BD, target_KD)
            # One for all chunks, whose scores are compared; the mean where most pairs are of equal texts.
            unit = unit or float(cost_BK.median()) or float(cost_BK.mean())
            if unit == 0.0:
                continue
            strength, least = epsilon * unit, tolerance * unit
            own_B = torch.zeros(len(picked), dtype=torch.float64)
            if divergence == "sinkhorn":
                own_B = own_potentials(torch.cdist(pool_BD, pool_BD), strength, least)
            # From the pool's own potentials a target that equals it is solved at once, even where entropy alone binds its groups.
            score_B[picked] = -calibrated(potentials(cost_BK, strength, least, own_B) - own_B)
        return [float(one) for one in score_B]

    return RowScore(score)


def potentials(cost_BK: Tensor, epsilon: float, tolerance: float, start_B: Tensor | None = None) -> Tensor:
    """The pool's side of the dual of entropic optimal transport between equal weights, in fp64.

    They belong to `min <P, C> + epsilon * KL(P || mu x nu)` over plans P with the marginals mu and nu, and are given with mean 0:
    their own constant means nothing.

    Args:
        cost_BK: the cost of each pair, in fp64.
        epsilon: strength of the entropic smoothing, in units of the cost.
        tolerance: the largest change at which they count as found, in units of the cost.
        start_B: where to begin; None: at 0.

    Raises:
        LuthierError: POT is not installed, or 25,600 iterations do not suffice.
    """
    return _solved(cost_BK, epsilon, tolerance, lambda f_B, g_K: f_B, start_B)


def own_potentials(cost_BB: Tensor, epsilon: float, tolerance: float) -> Tensor:
    """The same of a pool against itself. Both sides are one there, so that their mean is known long before either side is."""
    return _solved(cost_BB, epsilon, tolerance, lambda f_B, g_B: (f_B + g_B) / 2, None)


def _solved(
    cost_BK: Tensor, epsilon: float, tolerance: float, wanted: Callable[[Tensor, Tensor], Tensor], start_B: Tensor | None
) -> Tensor:
    """Steps can be small long before the end: rounds double in length, and the last must change nothing by more than the tolerance."""
    solver = _installed()
    pool_B, target_K = (torch.full((size,), 1.0 / size, dtype=torch.float64) for size in cost_BK.shape)
    # POT's scaling vectors hold the marginals: P = u exp(-C / epsilon) v, where the dual has P = mu nu exp((f + g - C) / epsilon).
    # These are even: what they add is a constant, and goes with the mean.
    logs = None if start_B is None else (start_B / epsilon, torch.zeros_like(target_K))
    before_B: Tensor | None = None
    done, length = 0, FIRST_ROUND
    while done < MOST_ITERATIONS:
        _, found = solver.bregman.sinkhorn_log(
            pool_B, target_K, cost_BK, epsilon, numItermax=length, stopThr=1e-16, log=True, warn=False, warmstart=logs
        )
        logs = (found["log_u"], found["log_v"])
        now_B = wanted(epsilon * logs[0], epsilon * logs[1])
        now_B = now_B - now_B.mean()
        done += length
        if before_B is not None and float((now_B - before_B).abs().max()) <= tolerance:
            return now_B
        before_B, length = now_B, done
    fix = "use a larger `epsilon` (0.02) or `tolerance` (0.01)"
    raise LuthierError(f"optimal transport is not solved after {done} iterations", where="got_d", fix=fix)


def calibrated(potential_B: Tensor) -> Tensor:
    """The gradient that keeps the mass at 1: `f_i - (mean of the other f)`; one row alone has none."""
    size = len(potential_B)
    return (potential_B - potential_B.mean()) * (size / max(size - 1, 1))


def _installed() -> ModuleType:
    try:
        import ot
    except ImportError as error:
        raise LuthierError(f"POT is not installed ({error})", where="got_d", fix='pip install "luthier[selection]"') from error
    module: ModuleType = ot
    return module
