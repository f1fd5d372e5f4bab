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
        chosen: the key of the rows that holds the chosen answer's log-likelihood.
        rejected: that of the rejected one's.
    """

    def read(view: View) -> Tensor:
        first_P, second_P = sides_of(view.batch.groups, view.label_N.device)
        found_B = view["nll"].new_zeros(len(view.batch.row_ids))
        if not view.batch.groups:
            return found_B
        columns = view.batch.columns
        return found_B.index_put((first_P,), columns[chosen][first_P].to(found_B)).index_put(
            (second_P,), columns[rejected][second_P].to(found_B)
        )

    def check(batch: Batch) -> None:
        for name in (chosen, rejected):
            mend = f"add `{name}` to every row, a number of at most 0, or leave `stored_reference` out"
            check_numbers(batch, name, mend, called="log-likelihood", most=0.0)

    return Reference(read, check=check)
