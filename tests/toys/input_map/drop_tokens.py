"""A toy input map: tokens anywhere in a row are read as token 0 (word dropout; Bowman et al., 2016, section 3.1)."""

from __future__ import annotations

from torch import Tensor

from luthier.kinds import Batch, InputMap, Reading
from luthier.registry import method


@method(title="Drop tokens", reduces_to="rate 0: nothing changes")
def drop_tokens(*, rate: float = 0.25) -> InputMap:
    """Read a random share of the tokens as token 0.

    Args:
        rate: the chance that a token is dropped.
    """

    def map(batch: Batch, reading: Reading) -> Tensor:
        return batch.token_ids_BT.masked_fill(reading.uniform_BT(0) < rate, 0)

    return InputMap(map)
