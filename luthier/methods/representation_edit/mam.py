"""The Mix-And-Match adapter (He et al., 2022, section 4.6): a short prefix in attention, a wide scaled adapter beside the MLP."""

from __future__ import annotations

from luthier.kinds import Prefix, RepresentationEdit
from luthier.methods.prefix.prefix_tuning import Reparameterization, prefix_tuning
from luthier.methods.representation_edit.scaled_parallel_adapter import scaled_parallel_adapter
from luthier.registry import method


@method(
    title="MAM adapter",
    paper="arXiv:2110.04366",
    row=31,
    reduces_to="prefix tuning and a scaled parallel adapter, side by side",
    step0="on purpose not the base",
    merges="never",
    learning_rate=1e-4,
)
def mam(
    *, length: int = 30, width: int = 512, scale: float = 4.0, reparameterization: Reparameterization = "network"
) -> tuple[Prefix, RepresentationEdit]:
    """Spend few parameters on attention, where heads make them count, and most beside the MLPs, where width does.

    Args:
        length: l, keys and values that join every attention; 30 as in the paper.
        width: r, hidden units of each adapter; 512 is the paper's choice for MLPs of width 1024.
        scale: s, multiplies the adapter's output; 4 as in the paper.
        reparameterization: how the prefix is trained, see `prefix_tuning`.
    """
    prefix = prefix_tuning(length=length, reparameterization=reparameterization)
    return prefix, scaled_parallel_adapter(width=width, scale=scale)
