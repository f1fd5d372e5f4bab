"""The first adapters (Houlsby et al., 2019, section 2.1): one behind attention and one behind the MLP of every block."""

from __future__ import annotations

from luthier.kinds import RepresentationEdit
from luthier.methods.representation_edit import _bottleneck
from luthier.methods.representation_edit._bottleneck import ROLES, Init, Sublayer
from luthier.registry import method


@method(
    title="Serial adapter",
    paper="arXiv:1902.00751",
    reduces_to="adapter with insertion serial and scale 1",
    departs="a ReLU, as in arXiv:2110.04366; norms do not train along; starts at the base, where the paper starts close to it",
    merges="never",
    learning_rate=3e-4,
)
def serial_adapter(*, width: int = 64, place: Sublayer = "both", init: Init = "lora") -> RepresentationEdit:
    """Pass what attention and the MLP return through a small trained network with a connection around it.

    Args:
        width: hidden units of each adapter; 64 is the paper's middle size.
        place: `both` as in the paper, `mlp` as in AdapterFusion (arXiv:2005.00247), or `attention`.
        init: `lora` starts at the base; `bert` draws both maps from N(0, 0.02).
    """
    return _bottleneck.bottleneck(target_modules=ROLES[place], insertion="serial", width=width, init=init)
