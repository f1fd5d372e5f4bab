"""A toy edit: scale and shift the outputs of linear maps (Lian et al., 2022, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.kinds import Place, RepresentationEdit, Services, Tensors
from luthier.registry import method


@method(title="Scale and shift", learning_rate=1e-3)
def scale_shift(*, target_modules: tuple[str, ...] = ("attention", "mlp_down")) -> RepresentationEdit:
    """Scale and shift every output; folds into weight and bias.

    Args:
        target_modules: module types or groups of them of linear maps.
    """

    def start(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
        return {"scale": torch.ones(width_out), "shift": torch.zeros(width_out)}

    def apply(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return y * tensors["scale"] + tensors["shift"]

    def fold(tensors: Tensors, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias_O = tensors["shift"] if bias_O is None else bias_O * tensors["scale"] + tensors["shift"]
        return weight_OI * tensors["scale"][:, None], bias_O

    return RepresentationEdit(start, apply, target_modules, fold)
