"""NeuroAda (Zhang et al., 2025): every output neuron adapts, through the k incoming connections of largest magnitude."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Place, Select, Selective, Services
from luthier.kinds.parts import Parts
from luthier.methods.selective._entries import largest_of_rows, matrix
from luthier.registry import method


@method(
    title="NeuroAda",
    paper="arXiv:2510.18940",
    row=256,
    reduces_to="connections as many as a neuron has: full fine-tuning of the linear maps",
    departs="the paper adds a trained bypass to each connection: here the connections train in place, which needs no second weight "
    "in the forward pass; weight decay pulls towards the base all the same, as it does on bypasses that start at zero; gradients by "
    "which connections are ranked are those of plain cross-entropy without dropout, whatever the run minimizes",
    merges="is in place",
    learning_rate=7e-4,
)
def neuroada(
    *,
    connections: int = 20,
    by: Literal["magnitude", "gradient", "random", "smallest"] = "magnitude",
    calibration_rows: int = 128,
    calibration_source: str = "",
    target_modules: tuple[str, ...] = ("linear",),
) -> Selective:
    """Train a few incoming connections of every neuron, chosen once before training; biases stay frozen.

    Args:
        connections: k, how many connections of each neuron (row of a weight) train; all where it has fewer. 20 as in the paper's
            larger setting; with its smaller one, 1, the paper's learning rates are about ten times as high.
        by: how connections are ranked: by magnitude |w| (the paper's choice), by the magnitude of the loss's gradient, in random
            order, or smallest magnitude first (the paper's worst).
        calibration_rows: rows of whose mean loss `gradient` takes the gradient; the paper's code passes over all training rows.
        calibration_source: where these rows come from, named as under `rows` in a recipe; empty for the training rows.
        target_modules: module types or groups of them of linear maps.
    """
    if connections < 1:
        raise LuthierError(f"there are {connections} connections", where="neuroada: connections", fix="use at least 1")
    if calibration_rows < 1:
        raise LuthierError(f"there are {calibration_rows} rows", where="neuroada: calibration_rows", fix="use at least 1")

    def choose(parts: Parts, services: Services) -> dict[Place, Select]:
        places = parts.select(target_modules=target_modules)
        slopes = services.gradients(services.batches(calibration_rows, calibration_source), places) if by == "gradient" else {}
        chosen = {}
        for place in places:
            weight_OI = matrix(place, services)
            score_OI = slopes[place].abs() if by == "gradient" else score(place, weight_OI, services)
            index = largest_of_rows(score_OI, min(connections, weight_OI.shape[1]))
            chosen[place] = Select("flat", index, decay="start")
        return chosen

    def score(place: Place, weight_OI: Tensor, services: Services) -> Tensor:
        if by == "random":
            return torch.rand(weight_OI.shape, generator=services.rng(f"neuroada {place}"), dtype=torch.float64)
        return -weight_OI.abs() if by == "smallest" else weight_OI.abs()

    return Selective(choose)
