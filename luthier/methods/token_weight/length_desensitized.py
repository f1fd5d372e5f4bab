"""Length-desensitized preference optimization, LD-DPO (Liu et al., 2024): what an answer has beyond its mate's length counts less."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import TokenWeight, View
from luthier.registry import method
from luthier.rows.groups import check_pairs


@method(
    title="Length-desensitized preferences",
    paper="arXiv:2409.06411",
    reduces_to="share 1: every target counts fully",
    departs="a token weight, so that it goes with any loss over pairs",
)
def length_desensitized(*, share: float = 0.5) -> TokenWeight:
    """Let the targets of an answer that lie beyond the number its mate has count less, so that longer answers are not preferred for it.

    It stands beside a loss over pairs: `objective: dpo`, `token_weight: length_desensitized`.

    Args:
        share: alpha, what such a target counts; the paper has 0.1 to 0.6. 0 leaves them out.

    Raises:
        LuthierError: the share is out of range.
    """
    if not 0.0 <= share <= 1.0:
        raise LuthierError(f"the share is {share}", where="length_desensitized: share", mend="use 0 to 1")

    def weigh(view: View) -> Tensor:
        targets_B = view.targets_by_row()
        shorter_B = targets_B.clone()
        for group in view.batch.groups:
            shorter_B[list(group)] = targets_B[list(group)].min()
        # Targets stand in the order of rows and places.
        first_B = targets_B.cumsum(0) - targets_B
        number_N = torch.arange(len(view.row_N), device=view.row_N.device) - first_B[view.row_N]
        return torch.where(number_N < shorter_B[view.row_N], 1.0, share)

    return TokenWeight(weigh, check=check_pairs)
