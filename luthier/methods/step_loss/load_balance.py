"""The load balancing loss of the Switch Transformer (Fedus et al., 2021), section 2.2, equations 4 to 6."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import RowTable, StepLoss, Tensors, View
from luthier.registry import method


@method(
    title="Router load balancing",
    paper="arXiv:2101.03961",
    reduces_to="weight 0: no penalty",
    departs="f and P are means over all tokens of the step that are no padding, prompts and answers alike, where the paper's are those "
    "of a batch on one device; where a token is sent to K experts, f_e is the share of the tokens that expert e gets, so that "
    "balance is K and not 1; P_e is of the softmax of the router's logits, also where a router chooses by sigmoids or biases; added "
    "up over the blocks as in the paper, where transformers takes all blocks for one",
)
def load_balance(*, weight: float = 0.01) -> StepLoss:
    """Send tokens to all experts of a mixture alike: add `weight * E * sum_e f_e P_e` for each block, beside cross-entropy unless
    another loss is named.

    f_e is the share of the tokens that were sent to expert e, P_e the mean of the router's probabilities of it, and the gradient goes
    through P. It needs the counts of the whole step before the first backward pass, which costs one more forward pass.

    Args:
        weight: alpha, multiplies the term; the paper's 0.01.

    Raises:
        LuthierError: the weight is below 0.
    """
    if weight < 0.0:
        raise LuthierError(f"`weight` is {weight}", where="load_balance: weight", fix="use 0 or more")

    def value(view: View, own: Tensors) -> Tensor:
        own_BT1 = view.batch.own_tokens()[..., None]
        most = max(one.logits_BTE.shape[-1] for one in view.routed)
        blocks = []
        for one in view.routed:
            experts = one.logits_BTE.shape[-1]
            sums = [
                (functional.pad(number_BTE, (0, most - experts)) * own_BT1).sum(1)
                for number_BTE in (experts * one.chosen_BTE, one.logits_BTE.softmax(-1))
            ]
            blocks.append(torch.cat([*sums, own_BT1.sum(1).to(sums[0])], dim=-1))
        return torch.stack(blocks, dim=1)

    def loss(table: RowTable) -> Tensor:
        # Of each block: tokens sent to an expert times the number of experts, probabilities, and tokens.
        sum_LK = table.value.sum(0)
        most = (sum_LK.shape[-1] - 1) // 2
        sent_LE, probability_LE, tokens_L1 = sum_LK.split([most, most, 1], dim=-1)
        balance: Tensor = (sent_LE.detach() * probability_LE / tokens_L1.detach().square()).sum()
        return balance

    return StepLoss(value, loss, unit="step", columns=(), weight=weight, routers=True, penalty=True)
