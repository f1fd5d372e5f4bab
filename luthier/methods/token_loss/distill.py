"""Knowledge distillation (Hinton et al., 2015): learn the whole distribution of a teacher at each target, not the target alone."""

from __future__ import annotations

import math

from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Chunk, Column, OtherPass, TokenLoss, View
from luthier.methods.token_loss._distributions import Direction, with_rest
from luthier.methods.token_loss._distributions import divergence as between
from luthier.registry import method


@method(
    title="Distillation from a teacher",
    paper="arXiv:1503.02531",
    reduces_to="the model itself as teacher: a loss of 0 and no gradient",
    departs="the forward divergence where the paper has cross-entropy with the teacher's distribution, which differs by a number",
)
def distill(
    *,
    teacher: str = "teacher",
    divergence: Direction = "forward",
    top_k: int | None = None,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> TokenLoss:
    """Learn what a teacher would say at each target: `models: {teacher: MODEL or RUN}` names it.

    The divergence is in nats, a mean over the labels, with both distributions at the temperature, times its square, so that the size of
    gradients does not depend on it (Hinton et al., 2015). The teacher reads the same tokens, without dropout, and has the same tokenizer.
    It costs one forward pass of the teacher. Beside `cross_entropy` it learns from the labels as well: the terms' weights say how much
    of each.

    Args:
        teacher: which of the recipe's `models`.
        divergence: `forward`, KL(teacher || model), covers all that the teacher holds possible; `reverse`, KL(model || teacher), keeps to
            what it holds likely; `js`, the mean of both to their midpoint, at most ln 2.
        top_k: compare the teacher's likeliest tokens one by one and all others as one; none: all of them. Less than all is a lower bound.
        temperature: above 1 it shows more of what is unlikely; 1 as in distillation of language models, 2 to 20 in the paper.
        weight: multiplies the term.

    Raises:
        LuthierError: an option is out of range.
    """
    if top_k is not None and top_k < 1:
        raise LuthierError(f"{top_k} tokens are compared", where="distill: top_k", fix="use 1 or more, or leave it out for all")
    if not 0.0 < temperature < math.inf:
        raise LuthierError(f"the temperature is {temperature}", where="distill: temperature", fix="use more than 0")

    def value(chunk: Chunk) -> Tensor:
        theirs_CV, mine_CV = _common(chunk.others[teacher] / temperature, chunk.logits_CV / temperature)
        theirs, mine = theirs_CV.log_softmax(1), mine_CV.log_softmax(1)
        if top_k is not None and top_k < theirs.shape[1]:
            place_CK = theirs.topk(top_k, dim=1).indices
            theirs, mine = with_rest(theirs, place_CK), with_rest(mine, place_CK)
        return temperature**2 * between(theirs, mine, divergence)

    name = f"distill {teacher} {divergence} {top_k} {temperature}"
    column = Column(name, value, (OtherPass(teacher, model=teacher),))

    def loss(view: View) -> Tensor:
        return view[name]

    return TokenLoss(loss, columns=(column,), weight=weight)


def _common(one_CV: Tensor, other_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the ids that the other lacks, which stand for no token."""
    width = min(one_CV.shape[1], other_CV.shape[1])
    return one_CV[:, :width], other_CV[:, :width]
