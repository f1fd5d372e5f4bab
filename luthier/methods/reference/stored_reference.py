"""Likelihoods of both answers that were made once, before training: no pass over the reference at all."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import Batch, Reference, Stored, View, sides_of
from luthier.registry import method
from luthier.rows.free_columns import check_numbers
from luthier.rows.numbered import PAIRED


@method(title="A reference that was stored")
def stored_reference(*, chosen: str = "reference_chosen", rejected: str = "reference_rejected") -> Reference:
    """Compare with log-likelihoods of whole answers, in nats, that lie in a store beside the rows or are columns of them.

    It stands beside a loss with a reference: `objective: [dpo, stored_reference]`. `luthier rows store likelihood` writes a store, which is
    refused where it is not of the same tokens and of the model before training. Of columns you know that yourself. No token weights are in
    the numbers.

    Args:
        chosen: the key of the rows that holds the chosen answer's log-likelihood, or that of an answer which stands by itself.
        rejected: that of the rejected one's.
    """

    def read(view: View) -> Tensor:
        columns = view.batch.columns
        if chosen not in columns:
            # Rows without anything to learn, which some process has to run, have no columns.
            return view["nll"].new_zeros(len(view.batch.row_ids))
        _, second_P = sides_of(view.batch.groups, view.label_N.device)
        found_B = columns[chosen].to(view["nll"])
        return found_B.index_put((second_P,), columns[rejected][second_P].to(found_B)) if len(second_P) else found_B

    def check(batch: Batch) -> None:
        for name in (chosen, rejected) if batch.groups else (chosen,):
            fix = f"add `{name}` to every row, a number of at most 0, or leave `stored_reference` out"
            check_numbers(batch, name, fix, called="log-likelihood", most=0.0)

    # A store gives rows columns of these names alone.
    usual = (chosen, rejected) == PAIRED
    return Reference(read, check=check, stored=Stored("likelihood", unless=PAIRED, of_base=True) if usual else None)
