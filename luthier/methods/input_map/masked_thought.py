"""Masked Thought Fine-Tuning (Chen et al., 2024), after the authors' code: random tokens of the answer are hidden on the input side."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, InputMap, Now, Reading, Vocabulary
from luthier.registry import method

CHOSEN, RANDOM, WHICH = range(3)
"""Streams of draws: whether a token is replaced, whether by a random one, and by which."""


@method(
    title="Masked Thought Fine-Tuning",
    paper="arXiv:2403.02178",
    row=14,
    reduces_to="mask_probability 0: the same run without it",
    departs="the mask is an existing token, where the paper may add one; special tokens are neither replaced nor drawn; the rate rises "
    "with the optimizer step and reaches its end exactly, where the authors' code adds 1 to the length of the warm-up",
    replication="masked_thought",
)
def masked_thought(
    *, mask_probability: float = 0.4, warmup: float = 2 / 3, random_share: float = 1.0, mask_id: int | None = None
) -> InputMap:
    """Replace random tokens of the answer on the input side, so that later ones must be told from the question and from afar.

    The labels stay complete: a token whose input is replaced is still predicted. The prompt and special tokens are read as they
    are. The training loss rises with the rate; evaluation reads clean rows and shows what was learned.

    Args:
        mask_probability: the chance that a token of the answer is replaced, once warm-up is over; the authors' script for GSM8K has 0.4,
            those for larger sets 0.2.
        warmup: share of the steps in which the chance rises from 0 to `mask_probability`, in a straight line.
        random_share: the chance that a replaced token becomes a random one of the vocabulary instead of the mask: 1 in the authors'
            script for GSM8K, 0 for larger sets.
        mask_id: the mask's token id; none: the tokenizer's mask token, else its unknown token, else its padding token.

    Raises:
        LuthierError: a number is out of range, or a mask is needed and the tokenizer has none.
    """
    for name, value in (("mask_probability", mask_probability), ("warmup", warmup), ("random_share", random_share)):
        if not 0.0 <= value <= 1.0:
            raise LuthierError(f"`{name}` is {value}", where=f"masked_thought: {name}", fix="use 0 to 1")

    def check(vocabulary: Vocabulary) -> None:
        size = len(vocabulary.text_V)
        if mask_id is not None and not 0 <= mask_id < size:
            raise LuthierError(
                f"the model has no token id {mask_id}", where="masked_thought: mask_id", fix=f"use an id from 0 to {size - 1}"
            )
        if random_share < 1.0 and mask_of(vocabulary) is None:
            raise LuthierError(
                "the tokenizer has no token that could be the mask",
                where="masked_thought: mask_id",
                fix="give the id of a token that the rows seldom use, or set random_share: 1",
            )

    def mask_of(vocabulary: Vocabulary) -> int | None:
        return vocabulary.mask if mask_id is None else mask_id

    def map(batch: Batch, reading: Reading) -> Tensor:
        text_V, mask = reading.vocabulary.text_V, mask_of(reading.vocabulary)
        is_text_BT = (batch.token_ids_BT >= 0) & text_V[batch.token_ids_BT.clamp(min=0)]
        chance = chance_at(reading.now, mask_probability, warmup)
        replaced_BT = (batch.label_BT >= 0) & is_text_BT & (reading.uniform_BT(CHOSEN) < chance)
        text_ids_W = text_V.nonzero()[:, 0]
        put_BT = text_ids_W[(reading.uniform_BT(WHICH) * len(text_ids_W)).long()]
        if mask is not None:
            put_BT = torch.where(reading.uniform_BT(RANDOM) < random_share, put_BT, mask)
        return torch.where(replaced_BT, put_BT, batch.token_ids_BT)

    return InputMap(map, check)


def chance_at(now: Now, mask_probability: float, warmup: float) -> float:
    """The chance that a token is replaced: 0 at the first step, and `mask_probability` from the share `warmup` of the steps on."""
    rising = warmup * now.steps
    return mask_probability if now.step >= rising else mask_probability * now.step / rising
