"""A toy objective with numbers of its own: also predict the token after the next."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from luthier.kinds import Batch, LossTerm, Services, Tensors, View
from luthier.registry import method


@method(title="Extra head")
def extra_head(*, weight: float = 0.3) -> LossTerm:
    """Map each hidden state to what the language-model head can read the token after the next from.

    Args:
        weight: multiplies the term.
    """

    def start(services: Services) -> Tensors:
        return {"map_DD": torch.eye(services.parts.width)}

    def count(batch: Batch) -> float:
        before = batch.attend_BT[:, :-2] & batch.attend_BT[:, 1:-1]
        return float(((batch.label_BT[:, 2:] >= 0) & before).sum())

    def total(view: View, own: Tensors) -> Tensor:
        assert view.hidden_BTD is not None and view.services is not None
        source_N = view.position_N - 2
        early_N = (source_N >= 0) & view.batch.attend_BT[view.row_N, source_N.clamp(min=0)]
        hidden_ND = view.hidden_BTD[view.row_N[early_N], source_N[early_N]]
        mapped_ND = functional.linear(hidden_ND, own["map_DD"].to(hidden_ND.dtype))
        return view.services.nll(mapped_ND, view.label_N[early_N]).sum()

    return LossTerm(total, count=count, start=start, weight=weight, hidden=True)
