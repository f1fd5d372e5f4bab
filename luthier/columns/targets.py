"""Which tokens are predicted, and from where: the causal shift, done here and nowhere else."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from luthier.kinds import Batch


class Targets(NamedTuple):
    """The labels of a batch: where the hidden state that predicts each stands, and what it predicts. All have shape [N]."""

    row_N: Tensor
    source_N: Tensor
    """Time index of the hidden state, one before the label's."""
    label_N: Tensor


def find_targets(batch: Batch) -> Targets:
    """Find the labels of a batch. This is the causal shift, done here and nowhere else.

    A label must directly follow an attended token of its row; a label at a row's first token has nothing before it to predict it.
    """
    follows = (batch.label_BT[:, 1:] >= 0) & batch.attend_BT[:, :-1]
    row_N, source_N = follows.nonzero(as_tuple=True)
    return Targets(row_N, source_N, batch.label_BT[row_N, source_N + 1])
