"""IA3 (Liu et al., 2022, section 3.3): keys, values and the inner activations of the MLP are scaled, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, RepresentationEdit, Services, Tensors
from luthier.methods.representation_edit._scaling import scaled, scaled_inputs, scaled_outputs
from luthier.registry import method


@method(
    title="IA3",
    paper="arXiv:2205.05638",
    departs="trains l - 1 instead of l, so that weight decay would pull to the base",
    learning_rate=3e-3,
)
def ia3(
    *,
    outputs: tuple[str, ...] = ("attention_key", "attention_value"),
    inputs: tuple[str, ...] = ("mlp_down",),
) -> tuple[RepresentationEdit, ...]:
    """Learn a factor for each channel of keys, values and what the MLP's last map reads; all of it folds into the weights.

    Args:
        outputs: linear maps whose outputs are scaled; keys and values, as in the paper (l_k and l_v).
        inputs: linear maps whose inputs are scaled; the MLP's last, as in the paper (l_ff).
    """
    if not outputs and not inputs:
        raise LuthierError("nothing is scaled", where="ia3", fix="name outputs, inputs or both")
    edits = (
        RepresentationEdit(_start_output, _apply, outputs, _fold_output),
        RepresentationEdit(_start_input, _apply, inputs, _fold_input, of="input"),
    )
    return tuple(edit for edit in edits if edit.target_modules)


def _start_output(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
    return {"scale": torch.zeros(width_out)}


def _start_input(place: Place, width_in: int, width_out: int, services: Services) -> Tensors:
    return {"scale": torch.zeros(width_in)}


def _apply(tensors: Tensors, x: Tensor, y: Tensor) -> Tensor:
    return scaled(y, tensors["scale"])


def _fold_output(tensors: Tensors, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return scaled_outputs(weight_OI, tensors["scale"]), None if bias_O is None else scaled(bias_O, tensors["scale"])


def _fold_input(tensors: Tensors, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return scaled_inputs(weight_OI, tensors["scale"]), bias_O
