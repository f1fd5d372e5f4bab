"""Distributional preference alignment by optimal transport, AOT (Melnyk et al., 2024), for pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import RowTable, StepLoss, Tensors, View
from luthier.methods.pair_loss._checks import check_beta, check_share
from luthier.methods.pair_loss._logistic import smoothed_logistic
from luthier.registry import method
from luthier.rows.groups import check_pairs


@method(
    title="Alignment via optimal transport",
    paper="arXiv:2406.05882",
    reduces_to="one pair a step: dpo",
    departs="sorted over the pairs of the whole step, where the authors' code sorts each micro-batch",
    learning_rate=1e-6,
)
def aot(*, beta: float = 0.1, label_smoothing: float = 0.0, weight: float = 1.0) -> StepLoss:
    """Make the distribution of the model's margins over a step's pairs larger than the reference's, quantile by quantile.

    Args:
        beta: as for `dpo`.
        label_smoothing: share of the pairs that are taken to be labelled the wrong way round.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "aot")
    check_share(label_smoothing, "aot", "label_smoothing")

    def value(view: View, own: Tensors) -> Tensor:
        assert view.reference_B is not None
        return torch.stack([view.log_likelihoods(), view.reference_B], dim=1)

    def loss(table: RowTable) -> Tensor:
        chosen_G, rejected_G = table.sides()
        margin_G2 = table.value[chosen_G] - table.value[rejected_G]
        delta_G = beta * (margin_G2[:, 0].sort().values - margin_G2[:, 1].sort().values)
        return smoothed_logistic(delta_G, label_smoothing).sum()

    return StepLoss(value, loss, unit="group", reference=True, weight=weight, check=check_pairs)
