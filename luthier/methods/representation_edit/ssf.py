"""SSF (Lian et al., 2022, section 3.2): every operation's output is scaled and shifted, channel by channel, and that folds away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, RepresentationEdit, Services, Tensors
from luthier.kinds.parts import GROUPS, expand_roles
from luthier.methods.representation_edit._scaling import scaled, scaled_outputs
from luthier.registry import method

ShiftWhere = Literal["foldable", "everywhere", "none"]

TAKES = (*GROUPS["linear"], *GROUPS["norm"], "head", "embedding")
"""Roles whose modules compute one linear map, one norm or one look-up, so that their outputs fold into their weights."""


@method(
    title="SSF",
    paper="arXiv:2210.08823",
    row=72,
    reduces_to="shift none, on keys and values: IA3 there; scales held at 1: training the biases (BitFit)",
    departs="starts at the base (`noise` gives the paper's start); trains gamma - 1, so that weight decay would pull to the base; "
    "leaves the embedding alone by default, which a tied head would feel when folded; shifts fold away only where the model has biases",
    learning_rate=1e-3,
)
def ssf(
    *, target_modules: tuple[str, ...] = ("linear", "norm"), shift: ShiftWhere = "everywhere", noise: float = 0.0
) -> tuple[RepresentationEdit, ...]:
    """Learn a factor (gamma) and a shift (beta) for each output channel of linear maps and norms.

    Args:
        target_modules: what is scaled and shifted: linear maps, norms, `head`, `embedding`; module types or groups of them.
        shift: `everywhere`, as in the paper; where the model has no bias, as Llama has none, a shift stays beside the weights, and the
            result cannot be merged or exported as a plain model. `foldable` shifts where there is a bias to fold into, which in such
            models is nowhere, and `none` only scales.
        noise: standard deviation of gamma around 1 and of beta around 0 at the start; 0.02 in the authors' code.
    """
    unknown = [role for role in expand_roles(target_modules) if role not in TAKES]
    if unknown:
        raise LuthierError(
            f"outputs of `{unknown[0]}` do not fold into one weight",
            where="ssf: target_modules",
            fix=f"use some of {', '.join(TAKES)}",
        )
    if not target_modules:
        raise LuthierError("nothing is scaled", where="ssf: target_modules", fix="name module types, e.g. linear and norm")
    if noise < 0.0:
        raise LuthierError(f"the noise is {noise}", where="ssf: noise", fix="use 0 or more, e.g. 0.02")
    shifts = SHIFTS[shift]

    def start(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
        # An embedding's channels are its columns; of a norm only its own weight tells the width.
        channels = width_in if place.role == "embedding" else services.shape(place)[0]
        rng = services.rng(f"ssf {place}")
        tensors = {"scale": noise * torch.randn(channels, generator=rng)}
        if shifts(place, services):
            tensors["shift"] = noise * torch.randn(channels, generator=rng)
        return tensors

    chosen = expand_roles(target_modules)
    edits = (
        RepresentationEdit(start, _apply, tuple(role for role in chosen if role != "embedding"), _fold),
        RepresentationEdit(start, _apply, tuple(role for role in chosen if role == "embedding"), _fold_embedding),
    )
    return tuple(edit for edit in edits if edit.target_modules)


def _folds(place: Place, services: Services) -> bool:
    """Whether there is something to take the shift: a bias, or the rows of an embedding."""
    bias = any(other.module == place.module and other.tensor == "bias" for other in services.parts.places)
    return bias or place.role == "embedding"


def _always(place: Place, services: Services) -> bool:
    return True


def _never(place: Place, services: Services) -> bool:
    return False


SHIFTS: dict[ShiftWhere, Callable[[Place, Services], bool]] = {"foldable": _folds, "everywhere": _always, "none": _never}


def _apply(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
    new = scaled(y, tensors["scale"])
    return new + tensors["shift"] if "shift" in tensors else new


def _fold(tensors: Tensors, weight: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    new_bias_O = tensors.get("shift") if bias_O is None else _apply(tensors, bias_O, bias_O)
    return scaled_outputs(weight, tensors["scale"]), new_bias_O


def _fold_embedding(tensors: Tensors, table_VD: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return _apply(tensors, table_VD, table_VD), None
