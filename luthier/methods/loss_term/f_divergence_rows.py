"""Supervised fine-tuning with other f-divergences (Wang et al., 2025), with the reward of whole rows as the derivation has it."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import LossTerm, Tensors, View
from luthier.methods.token_loss._divergences import DIVERGENCES, Name, check_beta, note_stopped
from luthier.registry import method


@method(
    title="f-divergence fine-tuning, rows",
    paper="arXiv:2507.00018",
    row=101,
    reduces_to="divergence linear, or a model that is still the base: the gradient of each row's summed cross-entropy times beta",
    departs="the loss is not divided by beta, so that beta also scales the gradient; the paper's constants could not be confirmed; "
    "below a reward of -0.9 the Hellinger loss is a straight line, where its conjugate ends at -1; the base runs without dropout, "
    "so that with dropout r is not 0 at the start",
)
def f_divergence_rows(*, divergence: Name = "chi2", beta: float = 0.01) -> LossTerm:
    """Learn each row by how far the model has already moved from the base on all of it.

    The reward of a row is `r = beta * sum_t log(p / p_base)` over its labels; each label counts in it as much as its token weight
    says. The loss is a mean over rows, so a long row weighs as much as it has labels. See `f_divergence` for what each divergence
    does. A row moves by hundreds of nats: with a large `beta` `chi2` soon stops on nearly all rows, and the log says on which share
    of the labels.

    Args:
        divergence: which; `chi2` by luthier's choice.
        beta: scales the reward; at 0.01 `chi2` stops where a row is e^200 times as likely as it was. Luthier's choice.

    Raises:
        LuthierError: `beta` is out of range.
    """
    check_beta("f_divergence_rows", beta)
    chosen = DIVERGENCES[divergence]

    def total(view: View, own: Tensors) -> Tensor:
        reward_B = beta * view.sum_rows((view["reference_nll"] - view["nll"]) * view.weight_N)
        note_stopped(view, chosen.weight(reward_B)[view.row_N])
        # Rows without labels have the reward 0, and no phi but is 0 there.
        return chosen.phi(reward_B).sum()

    return LossTerm(total, unit="row", columns=("nll", "reference_nll"))
