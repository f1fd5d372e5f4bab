"""Weighted Preference Optimization (Zhou et al., 2024): pairs count as much as the model itself would write them."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import Chunk, Column, PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.methods.pair_loss.dpo import dpo
from luthier.registry import method


def _log_sum_of_squares(chunk: Chunk) -> Tensor:
    return (2.0 * chunk.log_probabilities).logsumexp(1)


SQUARES = Column("log_sum_of_squares", _log_sum_of_squares, gradient=False)
"""For each label the logarithm of the sum of all tokens' squared probabilities: the mean probability of a token that the model draws."""


@method(
    title="Weighted Preference Optimization",
    paper="arXiv:2406.11827",
    reduces_to="a model that finds every token equally likely: dpo",
    departs="weights are not bound to at most 1, as in the authors' code",
    learning_rate=1e-6,
)
def wpo(*, beta: float = 0.1, weight: float = 1.0) -> PairLoss:
    """DPO on pairs that another model wrote, as if the model had written them: each pair counts by how likely its answers are now.

    An answer's weight is the geometric mean over its tokens of their probability, relative to that of tokens that the model would draw
    (the paper's alignment of weights); a pair's is the product of both. No gradient goes through the weights.

    Args:
        beta: as for `dpo`.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "wpo")
    compared = dpo(beta=beta).loss

    def loss(pairs: Pairs) -> Tensor:
        return compared(pairs) * likely_now(pairs)

    return PairLoss(loss, reference=True, columns=(SQUARES,), reward_scale=beta, weight=weight)


def likely_now(pairs: Pairs) -> Tensor:
    """The weight of each pair, [P], without a gradient."""
    view = pairs.view
    with torch.no_grad():
        relative_B = view.sum_rows(-view["nll"] - view[SQUARES.name]) / view.targets_by_row().clamp(min=1)
        return (relative_B[pairs.first_P] + relative_B[pairs.second_P]).exp()
