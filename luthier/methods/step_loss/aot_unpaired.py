"""Distributional preference alignment by optimal transport, AOT (Melnyk et al., 2024), for answers that need not be paired."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import RowTable, StepLoss, Tensors, View
from luthier.methods.pair_loss._checks import check_beta, check_share
from luthier.methods.pair_loss._logistic import smoothed_logistic
from luthier.registry import method
from luthier.rows.groups import check_pairs


@method(
    title="Alignment via optimal transport, unpaired",
    paper="arXiv:2406.05882",
    reduces_to="one pair a step: dpo",
    departs="sorted over the pairs of the whole step, where the authors' code sorts each micro-batch; rows are pairs all the same, so that "
    "there are equally many of both",
    learning_rate=1e-6,
)
def aot_unpaired(*, beta: float = 0.1, label_smoothing: float = 0.0, weight: float = 1.0) -> StepLoss:
    """Make the distribution of the chosen answers' gains on the reference larger than that of the rejected ones', quantile by quantile,
    over all pairs of a step.

    Args:
        beta: as for `dpo`.
        label_smoothing: share of the pairs that are taken to be labelled the wrong way round.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    check_beta(beta, "aot_unpaired")
    check_share(label_smoothing, "aot_unpaired", "label_smoothing")

    def value(view: View, own: Tensors) -> Tensor:
        return view.gains()

    def loss(table: RowTable) -> Tensor:
        chosen_G, rejected_G = table.sides()
        delta_G = beta * (table.value[chosen_G].sort().values - table.value[rejected_G].sort().values)
        return smoothed_logistic(delta_G, label_smoothing).sum()

    return StepLoss(value, loss, unit="group", reference=True, weight=weight, check=check_pairs)
