"""Full fine-tuning: every number of the model trains."""

from __future__ import annotations

from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.registry import method


@method(title="Full fine-tuning", step0="base exactly", merges="is in place", learning_rate=1e-4)
def full(*, roles: tuple[str, ...] = ("all",), blocks: tuple[int, ...] | None = None) -> Selective:
    """Train every number, or every number of some roles and blocks.

    Args:
        roles: roles or groups of roles, e.g. `attention`, `mlp_down`, `norm`.
        blocks: block numbers from 0; None for all, with what stands outside the blocks.
    """

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {place: Select("whole") for place in parts.select(roles=roles, blocks=blocks, tensor=None)}

    return Selective(choose)
