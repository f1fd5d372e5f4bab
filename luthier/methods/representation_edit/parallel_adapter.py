"""Parallel adapter (He et al., 2022, section 3.3): it reads what enters a sub-layer and adds to what that returns."""

from __future__ import annotations

from luthier.kinds import RepresentationEdit
from luthier.methods.representation_edit import _bottleneck
from luthier.methods.representation_edit._bottleneck import ROLES, Sublayer
from luthier.registry import method


@method(
    title="Parallel adapter",
    paper="arXiv:2110.04366",
    row=31,
    reduces_to="adapter with scale 1",
    merges="never",
    learning_rate=1e-4,
)
def parallel_adapter(*, width: int = 512, place: Sublayer = "mlp") -> RepresentationEdit:
    """Run a small trained network beside the MLP or attention, on the same normed input, and add what it gives.

    Args:
        width: r, hidden units of each adapter; 512 is the paper's choice for MLPs of width 1024.
        place: the sub-layers that get one; the paper finds the MLP better unless there are very few parameters to train.
    """
    return _bottleneck.bottleneck(target_modules=ROLES[place], insertion="parallel", width=width)
