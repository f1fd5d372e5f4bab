"""DePT (Shi and Lipani, 2023), section 2.2: a short prompt P_s [P, D], and a low-rank update A B [S, D] of the input by position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Batch, Prompt, Services, Tensors
from luthier.methods.prompt._virtual import check_length, drawn_from, stand_before
from luthier.registry import method


@method(
    title="Decomposed Prompt Tuning",
    paper="arXiv:2309.05173",
    row=40,
    reduces_to="rank 0: prompt tuning",
    departs="positions count from the first token after the prompt, so that padding does not shift them, and those from S on stay as "
    "they are; unless told otherwise S ends before answers begin, where the paper takes the longest input of an encoder: what is "
    "generated behind a cache does not know its position",
    step0="on purpose not the base",
    merges="never",
    learning_rate=3e-2,
    replication="dept",
)
def dept(
    *,
    length: int = 40,
    rank: int = 45,
    alpha: float = 8.0,
    positions: int | None = None,
    table_learning_rate_factor: float = 0.1,
    calibration_rows: int = 64,
) -> Prompt:
    """Freeze the model and train a short prompt together with a low-rank change of the input's embeddings at each position.

    Args:
        length: m, tokens of the prompt; the paper's for a budget of 100 tokens.
        rank: r, of the change; the paper's for that budget and a width of 768.
        alpha: the change is scaled by alpha / sqrt(r); the authors' code has 8.
        positions: S, how many positions change; the paper's is 256. None: as many as the shortest question among some training rows has
            tokens, so that answers read the same when they are learned and when they are generated; a number above that is right where
            answers are scored and not generated.
        table_learning_rate_factor: multiplies the learning rate of A and B; the paper searches 0.0001 to 0.005 for these, beside 0.3 to 0.5
            for the prompt.
        calibration_rows: how many training rows are looked at for their questions.

    Raises:
        LuthierError: an option is out of range, or a row has no question.
    """
    check_length(length, "dept")
    if rank < 0:
        raise LuthierError(f"the rank is {rank}", where="dept: rank", fix="use at least 1, or 0 for the prompt alone")
    if positions is not None and positions < 1:
        raise LuthierError(f"{positions} positions change", where="dept: positions", fix="use at least 1")

    def start(table_VD: Tensor, services: Services) -> Tensors:
        prompt = {"prompt_PD": drawn_from(table_VD, length, services)}
        if not rank:
            return prompt
        reach = shortest_question(services.batches(calibration_rows)) if positions is None else positions
        bound = 1.0 / math.sqrt(rank)
        left_SR = torch.empty(reach, rank).uniform_(-bound, bound, generator=services.rng("table"))
        return {**prompt, "left_SR": left_SR, "right_RD": torch.zeros(rank, table_VD.shape[1])}

    def apply(tensors: Tensors, token_ids_BT: Tensor, embeds_BTD: Tensor) -> Tensor:
        whole_BTD = stand_before(tensors["prompt_PD"], token_ids_BT, embeds_BTD)
        if not rank:
            return whole_BTD
        table_SD = alpha / math.sqrt(rank) * tensors["left_SR"] @ tensors["right_RD"]
        return whole_BTD + at_positions(table_SD, positions_after_prompt(token_ids_BT))

    return Prompt(start, apply, length, rates={"left_SR": table_learning_rate_factor, "right_RD": table_learning_rate_factor})


def shortest_question(batches: Sequence[Batch]) -> int:
    """The fewest tokens before the first label of a row; rows without a label have no answer.

    Raises:
        LuthierError: a row begins with its answer, or none has one.
    """
    asked: list[int] = []
    for batch in batches:
        time_BT = torch.where(batch.label_BT >= 0, batch.position_BT, torch.iinfo(torch.int64).max)
        asked += time_BT.amin(1)[(batch.label_BT >= 0).any(1)].tolist()
    if min(asked, default=0) < 1:
        raise LuthierError(
            "a training row has no question before its answer",
            where="dept: positions",
            fix="say how many positions change, e.g. 256",
        )
    return min(asked)


def positions_after_prompt(token_ids_BT: Tensor) -> Tensor:
    """Each token's place [B, T] behind the last virtual id before it, from 0; -1 at virtual ids and where no prompt stands before.

    Rows that run one behind the other, each with its prompt, count anew.
    """
    time_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    is_virtual_BT = token_ids_BT < 0
    last_BT = torch.where(is_virtual_BT, time_T, -1).cummax(1).values
    return torch.where(last_BT >= 0, time_T - last_BT - 1, -1)


def at_positions(table_SD: Tensor, position_BT: Tensor) -> Tensor:
    """Rows of a table [B, T, D] by position; zero outside of it."""
    inside_BT = (position_BT >= 0) & (position_BT < len(table_SD))
    rows_BTD = functional.embedding(position_BT.clamp(0, len(table_SD) - 1), table_SD)
    return rows_BTD * inside_BT[..., None].to(rows_BTD.dtype)
