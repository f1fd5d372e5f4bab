"""A random share of each step's rows: the control of every rule that chooses among the rows of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import StepTable, TokenWeight
from luthier.registry import method


@method(title="Random rows of each step", reduces_to="share 1: plain cross-entropy")
def random_step_rows(*, share: float = 0.5) -> TokenWeight:
    """Learn from as many of each step's rows as a rule that chooses would keep, but chosen by chance. The others are not run.

    Args:
        share: of the step's rows with labels that is kept, to the nearest whole number; at least one row.

    Raises:
        LuthierError: the share is not above 0 and at most 1.
    """
    if not 0.0 < share <= 1.0:
        raise LuthierError(f"`share` is {share}", where="random_step_rows: share", fix="use more than 0 and at most 1")

    def look(table: StepTable) -> Tensor:
        assert table.services is not None
        rng = table.services.rng(f"step {table.now.step}")
        chosen = torch.randperm(table.rows, generator=rng)[: max(1, round(share * table.rows))]
        kept_R = torch.zeros(table.rows).index_fill(0, chosen, 1.0)
        return kept_R[table.row_M]

    return TokenWeight(look=look)
