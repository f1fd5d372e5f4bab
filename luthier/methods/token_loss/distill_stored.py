"""Knowledge distillation (Hinton et al., 2015) from what a teacher said of the rows beforehand: the teacher is not run."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import TEACHER, Chunk, Column, Likeliest, Stored, TokenLoss, View
from luthier.methods.token_loss._distributions import Direction, divergence, with_rest
from luthier.registry import method


@method(
    title="Distillation from stored probabilities",
    paper="arXiv:1503.02531",
    reduces_to="as many probabilities as the vocabulary has: distill at a temperature of 1",
    departs="all tokens but the teacher's likeliest count as one, which bounds the divergence from below; no temperature, since what is "
    "stored is at 1",
)
def distill_stored(*, direction: Direction = "forward", weight: float = 1.0) -> TokenLoss:
    """Learn what a teacher would say at each label from a store that it wrote once: `luthier rows store teacher ROWS --model TEACHER`.

    The divergence is in nats, a mean over the labels, over the tokens that are stored and all others as one. It costs no pass.

    Args:
        direction: as `divergence` of `distill`.
        weight: multiplies the term.
    """

    def value(chunk: Chunk) -> Tensor:
        top = Likeliest.of(chunk.given)
        mine = with_rest(chunk.log_probabilities, top.token_id_NK)
        theirs = top.log_probability_NK
        if mine.shape[1] > theirs.shape[1]:
            # Where all of the mass is stored the logarithm of the rest must stay finite.
            rest_N1 = top.rest_N.clamp(min=torch.finfo(top.rest_N.dtype).tiny).log()[:, None]
            theirs = torch.cat([theirs, rest_N1], dim=1)
        return divergence(theirs.to(mine), mine, direction)

    name = f"distill stored {direction}"

    def loss(view: View) -> Tensor:
        # The teacher never read a prompt's virtual tokens.
        return torch.where(view.is_own, view[name], 0.0)

    return TokenLoss(loss, columns=(Column(name, value, given=TEACHER),), weight=weight, stored=Stored("teacher"))
