"""Folding edits into weights: what stands between a weight and what its module multiplies by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import RepresentationEdit
from luthier.registry import Part
from luthier.tune.merge import _beyond_weight
from tests.toys.helpers import logits_of, model_of, rows_of_eight


class FromOne(nn.LayerNorm):
    """A norm that holds the difference of its scale from 1."""

    def forward(self, x: Tensor) -> Tensor:
        """The scaled and shifted [..., D]."""
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


@pytest.mark.parametrize(("module", "beyond"), [(nn.LayerNorm(6), 0.0), (FromOne(6), 1.0), (nn.RMSNorm(6), 0.0)])
def test_a_norm_is_asked_whether_its_weight_counts_from_one(module: nn.Module, beyond: float) -> None:
    """Also one that takes the mean away: all numbers alike would be zeros for it."""
    assert _beyond_weight(module, module.get_parameter("weight").data) == beyond


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_edit_folds_into_an_embedding_that_gives_its_rows_as_they_are(engine: Any, scale: float) -> None:
    value = RepresentationEdit(
        lambda place, width_in, width_out, services: {"factor": torch.tensor([1.5])},
        lambda tensors, x, y: y * tensors["factor"],
        ("embedding",),
        lambda tensors, weight_OI, bias_O: (weight_OI * tensors["factor"], bias_O),
    )
    model = model_of("gemma", layers=1, tied=False)
    model.model.embed_tokens.embed_scale = torch.tensor(scale, dtype=torch.float64)
    tune = engine([Part(name="probe", kind="any", options={}, values=(value,))], model=model).tune
    expected = logits_of(model, rows_of_eight())
    if scale == 1.0:
        tune.merge()
        assert torch.allclose(logits_of(model, rows_of_eight()), expected, rtol=1e-9, atol=1e-12)
    else:
        with pytest.raises(LuthierError, match="cannot be merged"):
            tune.merge()
