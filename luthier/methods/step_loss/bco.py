"""Binary Classifier Optimization (Jung et al., 2024), for pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.kinds import RowTable, StepLoss, Tensors, View
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method
from luthier.rows.groups import check_pairs


@method(
    title="Binary Classifier Optimization",
    paper="arXiv:2404.04656",
    reduces_to="shift false: every answer is classified by its own reward, as TRL's bco_pair does",
    departs="the shift is the mean of the step's rewards, where the paper has a running mean over steps",
    learning_rate=5e-7,
)
def bco(*, beta: float = 0.1, shift: bool = True, weight: float = 1.0) -> StepLoss:
    """Classify answers as chosen or rejected by their rewards, against the mean reward of the step.

    Args:
        beta: as for `dpo`.
        shift: subtract the mean of the chosen answers' mean reward and the rejected ones'; no gradient goes through it.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "bco")

    def value(view: View, own: Tensors) -> Tensor:
        return view.gains()

    def loss(table: RowTable) -> Tensor:
        chosen_G, rejected_G = (beta * table.value[side_G] for side_G in table.sides())
        middle = (chosen_G.mean() + rejected_G.mean()).detach() / 2 if shift else 0.0
        return -(logsigmoid(chosen_G - middle) + logsigmoid(middle - rejected_G)).sum()

    return StepLoss(value, loss, unit="group", reference=True, weight=weight, check=check_pairs)
