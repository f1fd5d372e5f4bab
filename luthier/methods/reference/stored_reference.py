"""Likelihoods of both answers that were made once, before training: no pass over the reference at all."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Batch, Reference, Stored, View
from luthier.registry import method
from luthier.rows.numbered import PAIRED


@method(title="A reference that was stored")
def stored_reference(*, chosen: str = "reference_chosen", rejected: str = "reference_rejected") -> Reference:
    """Compare with log-likelihoods of whole answers, in nats, that lie in a store beside the rows or are columns of them.

    It stands beside a loss with a reference: `objective: [dpo, stored_reference]`. `luthier rows store likelihood` writes a store, which is
    refused where it is not of the same tokens and of the model before training. Of columns you know that yourself. No token weights are in
    the numbers.

    Args:
        chosen: the key of the rows that holds the chosen answer's log-likelihood.
        rejected: that of the rejected one's.
    """

    def read(view: View) -> Tensor:
        first_P = torch.tensor([group[0] for group in view.batch.groups], dtype=torch.int64, device=view.label_N.device)
        second_P = torch.tensor([group[1] for group in view.batch.groups], dtype=torch.int64, device=view.label_N.device)
        found_B = view["nll"].new_zeros(len(view.batch.row_ids))
        if not view.batch.groups:
            return found_B
        columns = view.batch.columns
        return found_B.index_put((first_P,), columns[chosen][first_P].to(found_B)).index_put(
            (second_P,), columns[rejected][second_P].to(found_B)
        )

    def check(batch: Batch) -> None:
        for name in (chosen, rejected):
            column_B = batch.columns.get(name)
            if column_B is None or not bool((column_B.isfinite() & (column_B <= 0)).all()):
                raise LuthierError(
                    f"a row has no log-likelihood `{name}`",
                    where=f"row {batch.row_ids[0]}",
                    mend=f"add `{name}` to every row, a number of at most 0, or leave `stored_reference` out",
                )

    # A store gives rows columns of these names alone.
    usual = (chosen, rejected) == PAIRED
    return Reference(read, check=check, stored=Stored("likelihood", unless=PAIRED, of_base=True) if usual else None)
