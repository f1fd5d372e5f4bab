"""ssToken (Qin et al., 2025), section 3: of each row only the labels count that were learned most or that look most at the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier import machine
from luthier.columns.losses import nll
from luthier.errors import LuthierError
from luthier.kinds import Batch, Callback, Chunk, Column, OtherPass, Services, State, TokenWeight, View
from luthier.methods.token_weight._ranks import span_in_rows, top_in_rows
from luthier.registry import method

HISTORY = OtherPass("history", at="sstoken")
HISTORY_NLL = Column("history_nll", lambda chunk: _history_nll(chunk), (HISTORY,), gradient=False)
FLOOR = 0.05
"""Nats. Where excess losses differ less within a row, rounding may make the difference, and scaling it to 0 to 1 would make it decide:
two passes of one model in bf16 differ by up to 0.03 nats in rows of text where their kernels do (workshop, Xeon, torch 2.13)."""


def _history_nll(chunk: Chunk) -> Tensor:
    return nll(chunk.others[HISTORY.name], chunk.label_C)


@method(
    title="ssToken",
    paper="arXiv:2510.18250",
    row=1,
    reduces_to="share 1: plain cross-entropy",
    departs="a target's prompt is all before it in its row that is no target, virtual tokens and prefixes included, where the authors' "
    "code counts masked labels; attention alone decides in a share of the steps, which is the rule that code means, not in the rows before "
    "some index; the loss is that of the training pass, with its dropout, and the history's is computed beside it, not stored before; "
    "excess losses that differ by less than 0.05 nats in a row do not count; of equal scores the first in the row is kept",
    replication="sstoken",
)
def sstoken(
    *, share: float = 0.6, gamma: float = 0.5, attention_only: float = 0.2, every: int | None = None, average: float = 0.0
) -> TokenWeight | tuple[TokenWeight, Callback]:
    """Keep in each row the labels with the best score: how much better the model is than its own history, and how far it looks back.

    The score is gamma times the retrospective excess loss, the history's loss minus the model's, scaled to 0 to 1 within the row, plus
    1 - gamma times the last block's attention from the label's own place to the prompt. It costs one pass of the history without
    gradients. The run reports the mean score of kept labels and how far apart excess losses lie within a row.

    Args:
        share: of each row's labels that is kept, at least one; about 0.6 in the paper.
        gamma: how much the excess loss counts, 0 to 1, against the attention.
        attention_only: share of the run's steps at its start in which gamma is 0, since there is no excess loss yet; 10,000 of 50,000 rows
            in the authors' code.
        every: the history follows the model, every so many steps; none: it stays the model before training, as in the authors' code.
        average: what is left of the history when it follows: 0 makes it the model of that step, 0.99 with `every: 1` an average over time.

    Raises:
        LuthierError: a number is out of range, or `average` is set for a history that stays.
    """
    for name, value in (("share", share), ("gamma", gamma), ("attention_only", attention_only), ("average", average)):
        low, high = name == "share" and value == 0.0, name == "average" and value == 1.0
        if not 0.0 <= value <= 1.0 or low or high:
            raise LuthierError(f"`{name}` is {value}", where=f"sstoken: {name}", fix=f"use {'above ' * (name == 'share')}0 to 1")
    if every is not None and every < 1:
        raise LuthierError(f"`every` is {every}", where="sstoken: every", fix="use a number of steps, or leave it out")
    if every is None and average:
        raise LuthierError(
            "the history stays the model before training, so there is nothing to average",
            where="sstoken: average",
            fix="say with `every` after how many steps it follows",
        )
    history = "reference_nll" if every is None else HISTORY_NLL
    looks = gamma < 1.0 or attention_only > 0.0
    columns = ("nll", *([history] if gamma else []), *(["context_attention"] if looks else []))

    def weigh(view: View) -> Tensor:
        attention_N = view["context_attention"] if looks else torch.zeros_like(view["nll"])
        score_N = attention_N
        if gamma and view.now.phase((attention_only,)):
            excess_N = view["reference_nll" if every is None else HISTORY_NLL.name] - view["nll"]
            low_B, span_B = span_in_rows(excess_N, view.row_N, len(view.batch.row_ids))
            span_N = span_B[view.row_N]
            scaled_N = (excess_N - low_B[view.row_N]) / span_N.clamp(min=FLOOR)
            score_N = torch.where(span_N < FLOOR, attention_N, gamma * scaled_N + (1.0 - gamma) * attention_N)
            view.note("excess_span", span_N)
        count_B = view.targets_by_row()
        keep_B = kept(count_B, share)
        kept_N = top_in_rows(score_N, view.row_N, keep_B).to(view["nll"])
        # A row's mean over what it keeps, as a mean over all its labels.
        view.note("kept_score", score_N * kept_N * (count_B / keep_B.clamp(min=1))[view.row_N])
        return kept_N

    def count(batch: Batch) -> Tensor:
        return kept(batch.targets_by_row(), share)

    weight = TokenWeight(weigh, columns, count)
    if every is None:
        return weight

    def start(services: Services) -> State:
        services.remember(HISTORY.at, 1.0 - average)
        return {"remembered": 0}

    def after_step(state: State, services: Services) -> None:
        # Compared with what was done, not with the clock: a step without rows is not heard of here.
        times = services.now.after().step // every
        if times != state["remembered"]:
            services.remember(HISTORY.at, 1.0 - average)
            state["remembered"] = times

    return weight, Callback(after_step, start=start)


def kept(count_B: Tensor, share: float) -> Tensor:
    """How many labels of each row are kept: `share` of them rounded up, but 55 of 100 at 0.55, whose product in fp64 is above 55."""
    wanted_B = machine.computed_wide(lambda wide_B: (share * wide_B - 1e-9).ceil(), count_B)
    return wanted_B.clamp(min=1).minimum(count_B).long()
