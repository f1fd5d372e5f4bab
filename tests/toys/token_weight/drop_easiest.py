"""A toy rule over the whole step: the tokens the model knows best do not count."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import StepTable, TokenWeight
from luthier.registry import method


@method(title="Drop the easiest")
def drop_easiest(*, share: float = 0.3) -> TokenWeight:
    """Leave out the share of a step's targets with the smallest loss.

    Args:
        share: how much is left out, rounded down.
    """

    def look(table: StepTable) -> Tensor:
        keep_M = torch.ones(len(table))
        keep_M[table["nll"].argsort(stable=True)[: int(share * len(keep_M))]] = 0.0
        return keep_M

    return TokenWeight(columns=("nll",), look=look)
