"""Losses over pairs of answers, lowered to terms: each answer's likelihood, summed over its labels, and the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from luthier.kinds import Batch, LossTerm, PairLoss, Pairs, Reference, Side, Tensors, View, sides_of
from luthier.rows.groups import check_pairs

CHOSEN = "chosen log-likelihood"


BASE_REFERENCE = Reference(lambda view: view.log_likelihoods("reference_nll"), columns=("reference_nll",))
"""The model before training."""


def as_term(value: PairLoss, reference: Reference) -> LossTerm:
    """The term that a loss over pairs is.

    Args:
        value: the loss.
        reference: what answers are compared with, if it asks for that.
    """
    checks = [value.check, reference.check if value.reference else None]

    def total(view: View, own: Tensors) -> Tensor:
        found = pairs_of(view, reference if value.reference else None)
        _tell(found, value)
        return value.loss(found).sum()

    def check(batch: Batch) -> None:
        check_pairs(batch)
        for one in checks:
            if one is not None:
                one(batch)

    columns = ("nll", *value.columns, *(reference.columns if value.reference else ()))
    return LossTerm(total, unit="group", columns=columns, weight=value.weight, check=check)


def _tell(pairs: Pairs, value: PairLoss) -> None:
    """Log what shows how preferences are learned, and whether the chosen answers themselves become less likely."""
    chosen, rejected = pairs.chosen, pairs.rejected
    # A report draws the first few alone.
    pairs.note(CHOSEN, chosen.log_likelihood_P)
    pairs.note("rejected log-likelihood", rejected.log_likelihood_P)
    if value.reference:
        pairs.note("reward margin", value.reward_scale * pairs.margin_P)
        pairs.note("reward accuracy", _ahead(pairs.margin_P))
    pairs.note("preference accuracy", _ahead(chosen.log_likelihood_P - rejected.log_likelihood_P))
    if value.reference:
        pairs.note("reward chosen", value.reward_scale * chosen.gained_P)
        pairs.note("reward rejected", value.reward_scale * rejected.gained_P)
    pairs.note("chosen tokens", chosen.targets_P)
    pairs.note("rejected tokens", rejected.targets_P)


def warnings_of(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of a run whose chosen answers became less likely while pairs were compared.

    Args:
        history: of its steps, with what was logged.
    """
    told = [float(line["notes"][CHOSEN]) for line in history if CHOSEN in (line.get("notes") or {})]
    part = max(1, len(told) // 10)
    if len(told) < 2 or (now := fmean(told[-part:])) >= (before := fmean(told[:part])):
        return []
    return [
        f"the chosen answers became less likely while they were preferred: {before:.1f} nats in the first steps, {now:.1f} in the last; "
        "rpo, or cross_entropy beside the loss, holds them up"
    ]


def _ahead(difference_P: Tensor) -> Tensor:
    """1 where it is above 0, a half where it is 0."""
    return (difference_P.sign() + 1.0) / 2.0


def pairs_of(view: View, reference: Reference | None) -> Pairs:
    """The pairs of a micro-batch: what a loss over pairs reads.

    Args:
        view: of the rows' own labels.
        reference: what they are compared with, if anything.
    """
    likely_B = view.log_likelihoods()
    base_B = torch.zeros_like(likely_B) if reference is None else reference.read(view).detach().to(likely_B)
    targets_B = view.targets_by_row().clamp(min=1)
    places = sides_of(view.batch.learnt_groups(), likely_B.device)
    chosen, rejected = (Side.of(likely_B[place_P], base_B[place_P], targets_B[place_P]) for place_P in places)
    return Pairs(chosen, rejected, view, *places, chosen.gained_P - rejected.gained_P)
