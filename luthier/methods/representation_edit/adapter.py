"""Adapters as one design space (He et al., 2022, section 3): form, insertion, place and composition, each an option."""

from __future__ import annotations

from luthier.kinds import RepresentationEdit
from luthier.methods.representation_edit import _bottleneck
from luthier.methods.representation_edit._bottleneck import ROLES, FormName, Init, Insertion, Sublayer
from luthier.registry import method


@method(
    title="Adapter",
    paper="arXiv:2110.04366",
    row=31,
    reduces_to="form linear without biases, parallel, scale alpha / rank: LoRA on what a whole sub-layer computes",
    departs="the gated composition and multi-head adapters are left out; the scale is set, which the paper finds better than learning it",
    merges="never",
    learning_rate=1e-4,
)
def adapter(
    *,
    width: int = 512,
    form: FormName = "bottleneck",
    insertion: Insertion = "parallel",
    place: Sublayer = "mlp",
    scale: float = 4.0,
    init: Init = "lora",
    dropout: float = 0.0,
) -> RepresentationEdit:
    """Add a small trained network to what attention, the MLP or both return; the defaults are the paper's best, a scaled parallel one.

    Args:
        width: r, hidden units of each adapter; 512 is the paper's choice for MLPs of width 1024.
        form: `bottleneck` has a ReLU between its two maps, `linear` nothing, as LoRA.
        insertion: `parallel` reads what enters the sub-layer, `serial` what it returns.
        place: the sub-layers that get one; the paper finds the MLP better unless there are very few parameters to train.
        scale: s, multiplies the adapter's output with its bias; 1 is plain addition, 4 the paper's choice.
        init: `lora` starts at the base; `bert` draws both maps from N(0, 0.02).
        dropout: probability of dropping a hidden unit while training, behind the ReLU.
    """
    return _bottleneck.bottleneck(
        target_modules=ROLES[place], insertion=insertion, width=width, scale=scale, form=form, init=init, dropout=dropout
    )
