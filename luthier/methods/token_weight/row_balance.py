"""The mean over samples of MFTCoder's losses (Liu et al., 2023), case 2 of the authors' code: every row counts alike."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import StepTable, TokenWeight
from luthier.methods.token_weight._tasks import spread
from luthier.registry import method


@method(
    title="Row balance",
    paper="arXiv:2311.02303",
    row=251,
    reduces_to="rows with equally many labels: plain cross-entropy",
    departs="the mean is over the rows of the whole step, where the authors' code takes one for each micro-batch and process",
)
def row_balance() -> TokenWeight:
    """Let every row of a step count alike, however many labels it has: the loss is the mean over rows of each row's mean.

    It costs no pass. Rows without a label have no mean and are not among them.
    """

    def look(table: StepTable) -> Tensor:
        return spread(table, torch.zeros_like(table.row_M), torch.ones(1, dtype=torch.float64), "rows")

    return TokenWeight(look=look)
