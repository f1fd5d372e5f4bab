"""Likelihoods of both answers that the rows hold: no pass over the reference at all."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import Batch, Reference, View, sides_of
from luthier.registry import method
from luthier.rows.numbers import check_numbers


@method(title="A reference that was stored")
def stored_reference(*, chosen: str = "reference_chosen", rejected: str = "reference_rejected") -> Reference:
    """Compare with log-likelihoods that the rows hold, of whole answers, in nats.

    It stands beside a loss with a reference: `objective: [dpo, stored_reference]`. The numbers must be of the same tokens: same tokenizer,
    same chat template, nothing cut off, no token weights.

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
            mend = f"add `{name}` to every row, a number of at most 0, or leave `stored_reference` out"
            check_numbers(batch, name, mend, called="log-likelihood", most=0.0)

    return Reference(read, check=check)
