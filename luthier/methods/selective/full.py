"""Full fine-tuning: every number of the model trains."""

from __future__ import annotations

from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.registry import method


@method(title="Full fine-tuning", step0="base exactly", merges="is in place", learning_rate=1e-4)
def full(*, target_modules: tuple[str, ...] = ("all",), blocks: tuple[int, ...] | None = None) -> Selective:
    """Train every parameter, or every parameter of some module types and blocks.

    Args:
        target_modules: module types or groups of them, e.g. `attention`, `mlp_down`, `norm`.
        blocks: block numbers from 0; None for all, with what stands outside the blocks.
    """

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        return {place: Select("whole") for place in parts.select(target_modules=target_modules, blocks=blocks, tensor=None)}

    return Selective(choose)
