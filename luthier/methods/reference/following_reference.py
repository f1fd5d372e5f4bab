"""Trust-region DPO (Gorbatovski et al., 2024): the reference follows the model."""

from __future__ import annotations

from torch import Tensor

from luthier.columns.losses import nll
from luthier.errors import LuthierError
from luthier.kinds import Callback, Column, OtherPass, Reference, Services, State, View
from luthier.registry import method

PASS = OtherPass("following", at="following")
COLUMN = Column("following_nll", lambda chunk: nll(chunk.others["following"], chunk.label_C), (PASS,), gradient=False)


@method(
    title="A reference that follows (trust-region DPO)",
    paper="arXiv:2404.09656",
    reduces_to="mix 0: the model before training",
)
def following_reference(*, sync_every: int = 512, mix: float = 0.6) -> tuple[Reference, Callback]:
    """Compare with a reference that moves towards the model every so often, so that long training is not held out by where it began.

    It stands beside a loss with a reference: `objective: [dpo, following_reference]`. It keeps one copy of the trained numbers.

    Args:
        sync_every: steps after which the reference moves; 512 in the paper's hard update, as in TRL.
        mix: alpha, the share of the model in the new reference; 0.6 in the paper, 1 replaces it.

    Raises:
        LuthierError: an option is out of range.
    """
    if sync_every < 1:
        raise LuthierError(
            f"the reference moves every {sync_every} steps", where="following_reference: sync_every", fix="use 1 or more"
        )
    if not 0.0 <= mix <= 1.0:
        raise LuthierError(f"the share is {mix}", where="following_reference: mix", fix="use 0 to 1")

    def read(view: View) -> Tensor:
        return view.log_likelihoods(COLUMN.name)

    def start(services: Services) -> State:
        # A copy; with the share it is refused right away where an average over time means nothing.
        services.remember(PASS.at, mix or 1.0)
        return {}

    def after_step(state: State, services: Services) -> None:
        if mix and (services.now.step + 1) % sync_every == 0:
            services.remember(PASS.at, mix)

    return Reference(read, columns=(COLUMN,)), Callback(after_step, start=start)
