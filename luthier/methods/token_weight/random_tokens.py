"""A random share of each row's labels: the control of every rule that chooses tokens."""

from __future__ import annotations

from torch import Tensor

from luthier import draws
from luthier.errors import LuthierError
from luthier.kinds import Batch, Column, TokenWeight, View
from luthier.methods.token_weight._ranks import top_in_rows
from luthier.methods.token_weight.sstoken import kept
from luthier.registry import method

DRAW = Column("random_tokens", lambda chunk: draws.uniform(chunk.key_C), gradient=False)


@method(title="Random tokens", reduces_to="share 1: plain cross-entropy")
def random_tokens(*, share: float = 0.6) -> TokenWeight:
    """Learn from as many of each row's labels as a rule that chooses would keep, but chosen by chance, anew in every step.

    Args:
        share: of each row's labels that is kept, rounded up; 0.6 as in `sstoken`.

    Raises:
        LuthierError: the share is not above 0 and at most 1.
    """
    if not 0.0 < share <= 1.0:
        raise LuthierError(f"`share` is {share}", where="random_tokens: share", fix="use more than 0 and at most 1")

    def weigh(view: View) -> Tensor:
        return top_in_rows(view[DRAW.name], view.row_N, kept(view.targets_by_row(), share)).to(view["nll"])

    def count(batch: Batch) -> Tensor:
        return kept(batch.targets_by_row(), share)

    return TokenWeight(weigh, ("nll", DRAW), count)
