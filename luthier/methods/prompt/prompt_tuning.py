"""Prompt tuning (Lester et al., 2021), section 2: trained embeddings P [P, D] before the input of a frozen model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Prompt, Services, Tensors
from luthier.methods.prompt._virtual import check_length, drawn_from, stand_before
from luthier.registry import method

SPREAD = 0.5
"""A random prompt is drawn evenly from -0.5 to 0.5 (section 3.2)."""


@method(
    title="Prompt tuning",
    paper="arXiv:2104.08691",
    departs="the default length is 20, where the paper uses 100 and finds that more than 20 gains little; AdamW, where it uses Adafactor",
    step0="on purpose not the base",
    merges="never",
    learning_rate=3e-2,
)
def prompt_tuning(
    *,
    length: int = 20,
    init: Literal["vocabulary", "text", "random"] = "vocabulary",
    token_ids: tuple[int, ...] = (),
) -> Prompt:
    """Freeze the model and train embeddings that stand before every row.

    Args:
        length: P, how many.
        init: what they start as: embeddings of tokens drawn from the 5,000 most common (the paper's best beside names of classes), of
            the tokens of a text, or numbers drawn evenly from -0.5 to 0.5.
        token_ids: the text that `text` starts from, repeated or cut to the length; none: a training row.
    """
    check_length(length, "prompt_tuning")
    if token_ids and init != "text":
        raise LuthierError(
            f"token ids of a text are given, and the prompt starts from {init}", where="prompt_tuning: init", fix="use init: text"
        )

    def start(table_VD: Tensor, services: Services) -> Tensors:
        if init == "vocabulary":
            return {"prompt_PD": drawn_from(table_VD, length, services)}
        if init == "random":
            shape = (length, table_VD.shape[1])
            return {"prompt_PD": torch.empty(shape).uniform_(-SPREAD, SPREAD, generator=services.rng("prompt"))}
        text_P = _repeated(torch.tensor(token_ids) if token_ids else _first_row(services), length)
        _refuse_unknown(text_P, len(table_VD))
        return {"prompt_PD": table_VD[text_P.to(table_VD.device)].clone()}

    def apply(tensors: Tensors, token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
        return stand_before(tensors["prompt_PD"], token_ids_BT, embeds_BTD)

    return Prompt(start, apply, length)


def _first_row(services: Services) -> Tensor:
    """The token ids of one training row."""
    batch = services.batches(1)[0]
    return batch.token_ids_BT[0, batch.attend_BT[0]]


def _repeated(text_T: Tensor, length: int) -> Tensor:
    return text_T[torch.arange(length) % len(text_T)]


def _refuse_unknown(text_P: Tensor, vocabulary: int) -> None:
    strange = text_P[(text_P < 0) | (text_P >= vocabulary)]
    if len(strange):
        raise LuthierError(
            f"the model has no token {int(strange[0])}",
            where="prompt_tuning: token_ids",
            fix=f"use ids from 0 to {vocabulary - 1}",
        )
