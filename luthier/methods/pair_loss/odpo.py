"""DPO with an offset (Amini et al., 2024): pairs say by how much one answer is better."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier.kinds import Batch, PairLoss, Pairs
from luthier.methods.pair_loss._checks import check_beta
from luthier.registry import method
from luthier.rows.free_columns import check_numbers


@method(
    title="DPO with an offset",
    paper="arXiv:2402.10571",
    reduces_to="scale 0: dpo",
    departs="the offset is the rows' own number times `scale`; the paper has the logarithm of a difference of scores",
    learning_rate=1e-6,
)
def odpo(*, beta: float = 0.1, scale: float = 1.0, column: str = "margin", weight: float = 1.0) -> PairLoss:
    """DPO in which the chosen answer's reward shall be larger by what the row says.

    Args:
        beta: as for `dpo`.
        scale: multiplies the rows' number.
        column: the key of the rows that holds it.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: beta is not above 0.
    """
    check_beta(beta, "odpo")

    def loss(pairs: Pairs) -> Tensor:
        return -logsigmoid(beta * pairs.margin_P - scale * pairs.column(column).to(pairs.margin_P))

    def check(batch: Batch) -> None:
        check_numbers(batch, column, f"add `{column}` to every row, or use dpo")

    return PairLoss(loss, reference=True, reward_scale=beta, weight=weight, check=check)
