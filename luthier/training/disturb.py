"""Disturbed passes: what a technique may see and change of the blocks' outputs, and the draws it gets."""

from __future__ import annotations

from torch import Tensor

from luthier import draws
from luthier.kinds import Batch, Disturbed, Now, OtherPass, State
from luthier.training.inputs import token_keys
from luthier.tune.forward import BlockChange


def disturbance(one: OtherPass, batch: Batch, now: Now, state: State) -> BlockChange | None:
    """What a pass does with each block's output; None: nothing.

    A block that runs again in backward, under gradient checkpointing, is disturbed as before: draws are by token, block and pass.
    """
    if one.disturb is None:
        return None
    disturb, own_BT, key_BT = one.disturb, batch.own_tokens(), token_keys(batch, now)

    def change(block: int, hidden_BTD: Tensor) -> Tensor:
        def normal(stream: int) -> Tensor:
            seed = draws.seed_of(one.name, now.stage, block, stream)
            return draws.normal(draws.features(key_BT, hidden_BTD.shape[-1]), seed)

        return disturb(Disturbed(block, hidden_BTD, own_BT, normal, now, state))

    return change
