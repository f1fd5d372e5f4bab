"""Layer-wise learning-rate decay (Tinn et al., 2021): lr_l = lr factor^(L + 1 - l), slower the lower a layer lies."""

from __future__ import annotations

from luthier.errors import LuthierError
from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.methods.selective._depth import depth
from luthier.registry import method


@method(
    title="Layer-wise learning-rate decay",
    paper="arXiv:2112.07869",
    row=20,
    reduces_to="factor 1: full fine-tuning",
    merges="is in place",
    learning_rate=1e-4,
)
def layer_decay(*, factor: float = 0.9, target_modules: tuple[str, ...] = ("all",)) -> Selective:
    """Train every parameter, with a learning rate that falls from the head down to the embeddings.

    What follows the blocks has the whole rate, the top block `factor` times it, and every block below `factor` times that above
    it; embeddings come last. A head that is tied to the embedding has the embedding's rate.

    Args:
        factor: xi, what the rate is multiplied with from one layer to the next below; the paper tries 0.8, 0.9 and 0.95.
        target_modules: which parameters train; module types or groups of them.
    """
    if not 0.0 < factor <= 1.0:
        raise LuthierError(f"the factor is {factor}", where="layer_decay: factor", fix="use more than 0 and at most 1")

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        top = parts.blocks + 1
        places = parts.select(target_modules=target_modules, tensor=None)
        return {place: Select("whole", rate=factor ** (top - depth(place, parts))) for place in places}

    return Selective(choose)
