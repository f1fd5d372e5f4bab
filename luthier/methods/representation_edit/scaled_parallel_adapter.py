"""Scaled parallel adapter (He et al., 2022, section 3.3): a parallel adapter beside the MLP whose output is scaled, as LoRA's is."""

from __future__ import annotations

from luthier.kinds import RepresentationEdit
from luthier.methods.representation_edit import _bottleneck
from luthier.methods.representation_edit._bottleneck import ROLES
from luthier.registry import method


@method(
    title="Scaled parallel adapter",
    paper="arXiv:2110.04366",
    row=31,
    reduces_to="scale 1: parallel adapter",
    merges="never",
    learning_rate=1e-4,
)
def scaled_parallel_adapter(*, width: int = 512, scale: float = 4.0) -> RepresentationEdit:
    """Run a small trained network beside every MLP and add what it gives, scaled.

    Args:
        width: r, hidden units of each adapter; 512 is the paper's choice for MLPs of width 1024.
        scale: s, multiplies the adapter's output with its bias; the paper tries 1, 2, 4 and 10.
    """
    return _bottleneck.bottleneck(target_modules=ROLES["mlp"], insertion="parallel", width=width, scale=scale)
