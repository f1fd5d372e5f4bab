"""Preference-Oriented Fine-Tuning (Fan et al., 2024): the model is to find each row's answer more likely than aligned models do."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from luthier.columns.targets import find_targets
from luthier.errors import LuthierError
from luthier.kinds import Batch, LossTerm, Tensors, View
from luthier.registry import method


@method(
    title="Preference-Oriented Fine-Tuning",
    paper="arXiv:2412.12865",
    row=77,
    reduces_to="gamma -1000: the cross-entropy of each row's mean, a mean over rows",
    departs="one set of labels on both sides, where the authors' code scores the answers and trains on every token; a row without a "
    "score is refused, where their code drops it",
    replication="poft",
)
def poft(*, beta: float = 1.0, gamma: float = 0.0, column: str = "aligned_log_likelihood") -> LossTerm:
    """Prefer the model to others that are aligned already, on each row's answer: what those find unlikely is learned less.

    With c the row's mean loss and s its score, the mean log-likelihood of a token under the aligned models, a row's loss is
    -log sigmoid(u), u = beta * (-c - s) + gamma; the loss is a mean over rows. The score comes before training:

        luthier rows score train.jsonl --by likelihood 'models=[NAME]' --column aligned_log_likelihood --out scored.jsonl

    A row counts beta * sigmoid(-u) times its own cross-entropy's gradient. That is a half where both sides find it equally likely, and
    falls as the model overtakes the others: compare with cross-entropy at that share of the learning rate. The mean of sigmoid(-u) over
    labels is logged as `poft weight`. Token weights weigh the mean c.

    Args:
        beta: steepness of the preference, for each nat of a mean token; 1 in the paper.
        gamma: added to the difference; 0 in the paper.
        column: the rows' free column that holds s.

    Raises:
        LuthierError: a number is out of range, or a row with labels has no finite score.
    """
    if not 0.0 < beta < math.inf:
        raise LuthierError(f"`beta` is {beta}", where="poft: beta", fix="use a finite number above 0")
    if not math.isfinite(gamma):
        raise LuthierError(f"`gamma` is {gamma}", where="poft: gamma", fix="use a finite number")

    def check(batch: Batch) -> None:
        rows_R = find_targets(batch).row_N.unique()
        score_B = batch.columns.get(column, torch.full((len(batch.row_ids),), math.nan))
        missing = rows_R[~score_B.to(rows_R.device)[rows_R].isfinite()].tolist()
        if missing:
            named = ", ".join(batch.row_ids[place] for place in missing[:5])
            raise LuthierError(
                f"{len(missing)} of {len(rows_R)} rows of a micro-batch have no finite number `{column}`",
                where=f"rows {named}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
                fix=f"luthier rows score FILE --by likelihood 'models=[NAME]' --column {column} --out scored.jsonl; train on that",
            )

    def count(batch: Batch) -> float:
        check(batch)
        return float(len(find_targets(batch).row_N.unique()))

    def total(view: View, own: Tensors) -> Tensor:
        share_B = view.sum_rows(view.weight_N.to(view["nll"]))
        learnt_B = share_B != 0
        mean_B = view.sum_rows(view["nll"] * view.weight_N) / torch.where(learnt_B, share_B, 1.0)
        # A pass that only keeps other processes company has no columns.
        score_B = view.batch.columns.get(column, torch.zeros_like(mean_B)).to(mean_B)
        margin_B = beta * (-mean_B - torch.where(learnt_B, score_B, 0.0)) + gamma
        view.note("poft weight", torch.sigmoid(-margin_B)[view.row_N])
        return -(functional.logsigmoid(margin_B) * learnt_B).sum()

    return LossTerm(total, unit="row", count=count, check=check)
