"""Length desensitization of losses over pairs, LD-DPO (Liu et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import TokenWeight, View, sides_of
from luthier.methods.token_weight._ranks import rank_in_rows
from luthier.registry import method
from luthier.rows.groups import check_pairs


@method(
    title="Length desensitization (LD-DPO)",
    paper="arXiv:2409.06411",
    reduces_to="alpha 1, or answers of equal length: the loss over pairs alone",
    departs="a weight of tokens, so that it goes with any loss over pairs; what else is minimized beside it counts these tokens less, too",
)
def length_desensitization(*, alpha: float = 0.5) -> TokenWeight:
    """Let what the longer answer of a pair has beyond the shorter one's length count less, so that length is not what is learned.

    It stands beside a loss over pairs: `objective: dpo` and `token_weight: length_desensitization`. The reference's likelihoods are weighed
    alike, so that a margin is 0 before training.

    Args:
        alpha: what the tokens beyond count, from 0 to 1; the middle of its range, since the paper chooses it for each model.

    Raises:
        LuthierError: alpha is not from 0 to 1, or rows are no pairs.
    """
    if not 0.0 <= alpha <= 1.0:
        raise LuthierError(f"alpha is {alpha}", where="length_desensitization: alpha", fix="use 0 to 1")

    def weigh(view: View) -> Tensor:
        shared_B = view.targets_by_row()
        first_P, second_P = sides_of(view.batch.groups, shared_B.device)
        shorter_P = torch.minimum(shared_B[first_P], shared_B[second_P])
        shared_B = shared_B.index_put((first_P,), shorter_P).index_put((second_P,), shorter_P)
        one_N = torch.ones_like(view.weight_N)
        return torch.where(rank_in_rows(view.row_N, len(shared_B)) < shared_B[view.row_N], one_N, alpha)

    return TokenWeight(weigh, check=check_pairs)
