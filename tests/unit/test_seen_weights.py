"""The weight that a linear map multiplies with is decided in one place: what is made of it sees the deltas, and the base is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from luthier.errors import LuthierError
from luthier.kinds import Now
from luthier.models.parts import map_parts
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.contracts.fixtures import part_of
from tests.toys.helpers import model_of, toys  # noqa: F401

PLACE = "model.layers.1.mlp.down_proj"


class Rounded(torch.autograd.Function):
    """Rounds to eighths; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor) -> Tensor:
        return (weight_OI * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient_OI: Tensor) -> Tensor:
        return gradient_OI


def tuned(model: Any) -> Tune:
    tune = Tune(model, map_parts(model))
    tune.add("lora", part_of("weight_delta", "lora", {"rank": 3, "dropout": 0.0}).values[0], RunServices(tune, "lora", Now()), {})
    for number, one in enumerate(tune.trained.values()):
        one.master.data.copy_(torch.randn(one.master.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    return tune


def test_deltas_are_in_what_is_seen_and_gradients_reach_them() -> None:
    """With `see`, the map is linear(x, see(W + deltas)); at the base it is the plain one, and taken off it is as before."""
    model = model_of()
    module, tune = model.get_submodule(PLACE), None
    x = torch.randn(5, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tune = tuned(model)
    (addition,) = tune.site(PLACE).additions
    beside, plain = module(x).detach(), functional.linear(x, module.weight)
    tune.site(PLACE).look_through(Rounded.apply)
    delta_OI = addition.value.delta(addition.tensors())
    expected = functional.linear(x, ((module.weight + delta_OI) * 8).round() / 8)
    seen = module(x)
    assert torch.allclose(seen, expected, rtol=1e-12, atol=1e-12) and not torch.allclose(seen, beside, atol=1e-3)
    slope = torch.randn(seen.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [one.leaf for one in addition.trained.values()]
    found = torch.autograd.grad((seen * slope).sum(), leaves)
    through = functional.linear(x, module.weight + addition.value.delta(addition.tensors()))
    for mine, theirs in zip(found, torch.autograd.grad((through * slope).sum(), leaves), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12) and float(mine.abs().max()) > 1e-3
    with tune.off():
        assert torch.equal(module(x), plain)
    tune.detach()
    assert torch.equal(module(x), plain)


def test_another_model_beside_the_weights_sees_them_as_they_are() -> None:
    """What one tune makes of a weight is not what the other one stands beside."""
    model = model_of()
    first, second = tuned(model), tuned(model)
    module = model.get_submodule(PLACE)
    x = torch.ones(2, module.in_features, dtype=torch.float64)
    (addition,) = second.site(PLACE).additions
    expected = functional.linear(x, module.weight + addition.value.delta(addition.tensors()))
    first.site(PLACE).look_through(Rounded.apply)
    first.others["other"], second.beneath, second.is_off = second, first, True
    with first.running("other"):
        assert torch.allclose(module(x), expected, rtol=1e-9)
    assert not torch.allclose(module(x), expected, atol=1e-3)


def test_only_plain_linear_maps_are_seen_through() -> None:
    tune = tuned(model_of())
    with pytest.raises(LuthierError, match="Embedding"):
        tune.site("model.embed_tokens").look_through(Rounded.apply)


def test_a_delta_on_a_part_of_a_fused_projection_is_seen_there() -> None:
    """Also where nothing below needs a gradient."""
    model = model_of("phi3", layers=1)
    tune = Tune(model, map_parts(model))
    value = part_of("weight_delta", "lora", {"rank": 3, "dropout": 0.0, "target_modules": ["attention_key"]}).values[0]
    tune.add("lora", value, RunServices(tune, "lora", Now()), {})
    for number, one in enumerate(tune.trained.values()):
        one.master.data.copy_(torch.randn(one.master.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    (addition,) = (one for site in tune.sites.values() for one in site.additions)
    assert addition.place is not None and 0 < addition.place.start < addition.place.stop
    module, leaves = model.get_submodule(addition.place.module), [one.leaf for one in addition.trained.values()]
    x = torch.randn(5, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    beside = module(x)
    tune.site(addition.place.module).look_through(lambda weight_OI: weight_OI * 1.0)
    seen = module(x)
    assert torch.allclose(seen, beside, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(seen, functional.linear(x, module.weight, module.bias), atol=1e-3)
    for mine, theirs in zip(torch.autograd.grad(seen.sum(), leaves), torch.autograd.grad(beside.sum(), leaves), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
