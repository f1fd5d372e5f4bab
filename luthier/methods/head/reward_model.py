"""Reward models by the Bradley-Terry model, alone or several beside each other (Eisenstein et al., 2023)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import logsigmoid

from luthier.errors import LuthierError
from luthier.kinds import Batch, Head, LossTerm, Services, Tensors, View, sides_of
from luthier.registry import method
from luthier.rows.free_columns import check_numbers
from luthier.rows.groups import check_pairs

SPREAD = 0.02
"""Standard deviation of the numbers that heads start from, as transformers draws them."""


@method(
    title="Reward model ensemble",
    paper="arXiv:2312.09244",
    row=207,
    reduces_to="members 1: a reward model; center_rewards_coefficient 0: plain Bradley-Terry",
    departs="members are heads over one model, the weaker of the paper's ensembles; theirs differ in their fine-tuning or pretraining",
    learning_rate=1e-5,
    replication="ensemble",
)
def reward_model(
    *,
    members: int = 1,
    center_rewards_coefficient: float = 0.01,
    margin: str = "",
    head_learning_rate_factor: float = 1.0,
    weight: float = 1.0,
) -> tuple[Head, LossTerm]:
    """Learn to score answers from pairs of which one is preferred: -log sigmoid(score of the chosen - score of the rejected).

    The score is read from the last hidden state of an answer's last token. It is saved with the run.

    Args:
        members: K, heads that differ in where they start; each learns by itself.
        center_rewards_coefficient: eta, multiplies (score of the chosen + score of the rejected) squared, which pulls a pair's mean to 0 so
            that members can be compared; the paper's regularizer.
        margin: a key of the rows by whose number the chosen answer's score shall be larger; none: any.
        head_learning_rate_factor: multiplies the learning rate of the heads.
        weight: multiplies the term where there are several.

    Raises:
        LuthierError: an option is out of range.
    """
    if members < 1:
        raise LuthierError(f"there are {members} members", where="reward_model: members", fix="use 1 or more")
    if center_rewards_coefficient < 0.0:
        raise LuthierError(
            f"the coefficient is {center_rewards_coefficient}",
            where="reward_model: center_rewards_coefficient",
            fix="use 0 or more",
        )

    def start(services: Services) -> Tensors:
        rngs = (services.rng(f"reward_model {member}") for member in range(members))
        return {"weight": torch.stack([SPREAD * torch.randn(services.parts.output_width, generator=rng) for rng in rngs])}

    def read(own: Tensors, hidden_BD: Tensor) -> Tensor:
        return functional.linear(hidden_BD, own["weight"])

    def total(view: View, own: Tensors) -> Tensor:
        first_P, second_P = sides_of(view.batch.groups, view.outputs_BK.device)
        chosen_PK, rejected_PK = view.outputs_BK[first_P], view.outputs_BK[second_P]
        difference_PK = chosen_PK - rejected_PK
        view.note_groups("accuracy", ((difference_PK.sign() + 1.0) / 2.0).mean(1))
        view.note_groups("reward margin", difference_PK.mean(1))
        view.note_groups("reward chosen", chosen_PK.mean(1))
        wanted_P1 = view.batch.columns[margin][first_P].to(difference_PK)[:, None] if margin else 0.0
        loss_PK = center_rewards_coefficient * (chosen_PK + rejected_PK).square() - logsigmoid(difference_PK - wanted_P1)
        return loss_PK.mean(1).sum()

    def check(batch: Batch) -> None:
        check_pairs(batch)
        if margin:
            check_numbers(batch, margin, "add it to every row")

    return (
        Head(start, read, "score", rate=head_learning_rate_factor, centered=center_rewards_coefficient > 0.0),
        LossTerm(total, unit="group", count=lambda batch: float(len(batch.groups)), columns=(), weight=weight, check=check),
    )
