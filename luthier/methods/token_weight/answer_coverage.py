"""Direct Coverage Optimization for answers with reasoning before them (Chen et al., 2025): the probability of the answer is measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luthier import machine
from luthier.columns.targets import find_targets
from luthier.errors import LuthierError
from luthier.kinds import Batch, TokenWeight, View
from luthier.methods.loss_term._coverage import check_samples, coverage_factor
from luthier.registry import method


@method(
    title="Direct Coverage Optimization, answers",
    paper="arXiv:2502.07154",
    row=193,
    reduces_to="samples 1 and a threshold above 1: cross-entropy",
    departs="the share of right samples stands in the rows, measured beforehand; the authors draw it anew while training; every label "
    "kept counts alike, where their code takes each row's mean first",
    replication="dco",
)
def answer_coverage(*, samples: int = 256, threshold: float = 0.1, column: str = "right_share") -> TokenWeight:
    """Weigh each row by how far its answer is from being covered, `F(N, p)` with p the share of samples that were right.

    Rows whose share is at `threshold` or above are left out, and their labels are not counted. The paper measures p with 64 samples
    at temperature 1.

    Args:
        samples: N, as many as will be drawn when the model is used; the paper has 1 to 4,096, and 256 lies amid them.
        threshold: the share from which on a row is left out; 0.1 in the authors' command.
        column: the rows' numeric column that holds the share, from 0 to 1.

    Raises:
        LuthierError: an option is out of range; a row has no share, or one outside of 0 to 1.
    """
    check_samples("answer_coverage", samples)
    if threshold <= 0.0:
        raise LuthierError(f"`threshold` is {threshold}", where="answer_coverage: threshold", fix="use more than 0, e.g. 0.1")

    def kept(share_B: Tensor) -> Tensor:
        # As exact as the column: 0.7 in fp32 is less than 0.7.
        return share_B < share_B.new_tensor(threshold)

    def weigh(view: View) -> Tensor:
        share_B = shares(view.batch, column)
        weight_B = coverage_factor(machine.computed_wide(lambda wide_B: -wide_B.log(), share_B), samples).where(kept(share_B), 0.0)
        return weight_B[view.row_N].to(view["nll"].dtype)

    def count(batch: Batch) -> Tensor:
        return batch.targets_by_row() * kept(shares(batch, column))

    def check(batch: Batch) -> None:
        shares(batch, column)

    return TokenWeight(weigh, ("nll",), count, check=check)


def shares(batch: Batch, column: str) -> Tensor:
    """The share of right samples of each row, [B]; without meaning for rows without labels, which need none.

    Raises:
        LuthierError: a row with labels has no such number, or one outside of 0 to 1.
    """
    needed_B = torch.zeros(len(batch.row_ids), dtype=torch.bool, device=batch.label_BT.device)
    needed_B[find_targets(batch).row_N] = True
    share_B = batch.columns.get(column, torch.full(needed_B.shape, torch.nan, device=needed_B.device))
    wrong = (needed_B & ~((share_B >= 0.0) & (share_B <= 1.0))).nonzero()[:, 0].tolist()
    if wrong:
        value = float(share_B[wrong[0]])
        raise LuthierError(
            f"the column `{column}` of this row " + ("is missing or no number" if math.isnan(value) else f"is {value}"),
            where=f"row {batch.row_ids[wrong[0]]}",
            fix=f"give every row `{column}`: the share of the model's sampled answers that are right, from 0 to 1",
        )
    return share_B
