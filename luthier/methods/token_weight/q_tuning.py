"""Q-Tuning (Wang et al., 2025), sections 3 and 4: rows of a step chosen by error and uncertainty, and tokens by smoothed perplexity."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from luthier import machine
from luthier.errors import LuthierError
from luthier.kinds import StepTable, TokenWeight
from luthier.methods.token_weight.sstoken import kept
from luthier.registry import method

MOST_NLL = 20.0
"""In nats: perplexities beyond e^20 are told apart by nothing, and their sums would overflow."""


@method(
    title="Q-Tuning",
    paper="arXiv:2509.23873",
    row=3,
    reduces_to="rows 1 and tokens 1: plain cross-entropy",
    departs="one threshold for both axes, found in closed form where the paper bisects; where the two corners hold too few rows, those "
    "nearest to them fill up the budget; at least one row is kept; the official code is not released, and that low smoothed "
    "perplexities are what is kept (`keep`) follows from the paper's purpose",
    replication="q_tuning",
)
def q_tuning(
    *,
    rows: float = 0.5,
    tokens: float = 0.7,
    neighbors: float = 0.5,
    joined: Literal["sum", "mean"] = "sum",
    edges: Literal["zero", "reflect"] = "zero",
    keep: Literal["low", "high"] = "low",
) -> TokenWeight:
    """Keep the rows on which the model is surely wrong, without their noisiest tokens, and those on which it is right but unsure.

    A row's error is its mean loss, its uncertainty the mean entropy of the model's distributions; both are ranked among the step's
    rows that have labels, so a step should hold many. Rows that are hard and unsure are taken for noise, rows that are easy and sure
    for known: both are left out and not run. Scores come from a pass of their own over the whole step, without gradients.

    Args:
        rows: share of the rows that are kept; the paper has 0.125, 0.25 and 0.5.
        tokens: share of the labels that are kept in rows of the first sort, rounded up; the paper has 0.5 and 0.7.
        neighbors: lambda, how much of a label's score is its neighbors': (1 - lambda) p[i] + lambda (p[i-1] + p[i+1]), where p are
            perplexities; 0.5 as in the paper.
        joined: neighbors' perplexities are added up, as the paper prints it, or averaged.
        edges: what stands for a neighbor that is no label: 0, as printed, or the label's own perplexity.
        keep: which scores stay: `low` leaves out the largest, `high` the smallest.

    Raises:
        LuthierError: a share is out of range.
    """
    for name, value in (("rows", rows), ("tokens", tokens)):
        if not 0.0 < value <= 1.0:
            raise LuthierError(f"`{name}` is {value}", where=f"q_tuning: {name}", fix="use more than 0 and at most 1")
    if not 0.0 <= neighbors <= 1.0:
        raise LuthierError(f"`neighbors` is {neighbors}", where="q_tuning: neighbors", fix="use 0 to 1")

    def look(table: StepTable) -> Tensor:
        targets_R = table.targets_by_row()
        error_R, doubt_R = (table.sum_rows(machine.widened(table[name])) / targets_R for name in ("nll", "entropy"))
        distance_R, wrong_R = corners(error_R, doubt_R)
        chosen_S = distance_R.argsort(stable=True)[: max(1, round(rows * table.rows))]
        kept_R = torch.zeros(table.rows, dtype=torch.bool).index_fill(0, chosen_S, True)
        score_M = smoothed(table, neighbors, joined, edges)
        rank_M = rank_in_row(table, score_M if keep == "low" else -score_M)
        count_R = torch.where(wrong_R, kept(targets_R, tokens), targets_R)
        keep_M = kept_R[table.row_M] & (rank_M < count_R[table.row_M])
        if table.rows:
            table.note("q_tuning rows kept", float(machine.widened(kept_R).mean()))
            table.note("q_tuning labels kept", float(machine.widened(keep_M).mean()))
            table.note("q_tuning top-up", float(machine.widened(2 * distance_R[chosen_S] > table.rows - 1).mean()))
        return machine.widened(keep_M)

    return TokenWeight(columns=("nll", "entropy"), look=look)


def corners(error_R: Tensor, doubt_R: Tensor) -> tuple[Tensor, Tensor]:
    """How far each row is from the nearer of two corners, in ranks, and whether that is the one of large error and little doubt.

    A row is within the quantiles alpha and 1 - alpha of a corner where its distance is at most alpha times (rows - 1). Ranks are
    integers, so that equal distances are equal; ties go by row.
    """
    most = len(error_R) - 1
    u_R, v_R = rank(error_R), rank(doubt_R)
    distance_R = torch.minimum(torch.maximum(most - u_R, v_R), torch.maximum(u_R, most - v_R))
    return distance_R, u_R > v_R


def rank(value_N: Tensor) -> Tensor:
    """Each value's place in ascending order, from 0."""
    return value_N.argsort(stable=True).argsort()


def smoothed(table: StepTable, neighbors: float, joined: str, edges: str) -> Tensor:
    """Each label's perplexity together with those of the tokens beside it, [M] in fp64."""
    own_M = machine.widened(table["nll"]).clamp(max=MOST_NLL).exp()
    beside_M = (table.row_M[1:] == table.row_M[:-1]) & (table.position_M[1:] == table.position_M[:-1] + 1)
    nothing_M = own_M if edges == "reflect" else torch.zeros_like(own_M)
    before_M, after_M = nothing_M.clone(), nothing_M.clone()
    before_M[1:] = torch.where(beside_M, own_M[:-1], nothing_M[1:])
    after_M[:-1] = torch.where(beside_M, own_M[1:], nothing_M[:-1])
    return (1.0 - neighbors) * own_M + (neighbors if joined == "sum" else neighbors / 2.0) * (before_M + after_M)


def rank_in_row(table: StepTable, value_M: Tensor) -> Tensor:
    """Each value's place in ascending order within its row, from 0; ties by position."""
    order_M = value_M.argsort(stable=True)
    order_M = order_M[table.row_M[order_M].argsort(stable=True)]
    targets_R = table.targets_by_row()
    # The table is sorted by row, and so is the order.
    first_M = (targets_R.cumsum(0) - targets_R)[table.row_M]
    return torch.empty_like(order_M).index_put((order_M,), torch.arange(len(order_M)) - first_M)
