"""What the tests of selections share: a selection from one matrix alone, and what trained in a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from luthier import registry
from luthier.kinds import Now, Place, Select

PLACE = Place("model.layers.0.mlp.up_proj", "weight", "mlp_up", 0)


def selected(spec: dict[str, Any], weight_OI: Tensor, gradient_OI: Tensor | None = None, seed: int = 0) -> Select:
    """What a technique selects of one matrix, the only one of its model."""
    (value,) = registry.make(spec, ("selective",)).values
    services = SimpleNamespace(
        slot=next(iter(spec)),
        now=Now(),
        weight=lambda place: weight_OI,
        rng=lambda key: torch.Generator().manual_seed(seed),
        batches=lambda rows, source: [],
        gradients=lambda batches, places: {PLACE: gradient_OI},
    )
    chosen: dict[Place, Select] = value.choose(SimpleNamespace(select=lambda **wanted: [PLACE]), services)
    assert list(chosen) == [PLACE]
    return chosen[PLACE]


def live(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def mask_of(one: Any, shape: torch.Size) -> Tensor:
    """True where a trained tensor's numbers are in its weight [O, I]."""
    mask = torch.zeros(shape, dtype=torch.bool)
    if one.form == "flat":
        mask.view(-1)[one.index] = True
    elif one.form == "rows":
        mask[one.index] = True
    else:
        mask[:, one.index] = True
    return mask


def dense_of(run: Any, one: Any, values: dict[str, Tensor]) -> Tensor:
    """The part of a parameter's values that is one trained tensor's place, [O, I]; it shares their memory."""
    whole = values[one.place.parameter]
    turned = whole.t() if one.place.module in run.tune.parts.transposed else whole
    return turned[one.place.start : one.place.stop]


def untouched(run: Any, base: dict[str, Tensor]) -> bool:
    """Whether every number outside the selection still has the base's bits; some number inside must not."""
    model, moved = run.tune.model, 0
    outside = {name: torch.ones(one.shape, dtype=torch.bool) for name, one in model.named_parameters()}
    for one in run.tune.trained.values():
        part = dense_of(run, one, outside)
        part &= ~mask_of(one, part.shape)
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter[outside[name]], base[name][outside[name]]):
            return False
        moved += int((parameter != base[name]).sum())
    return moved > 0
