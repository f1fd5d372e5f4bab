"""What a technique may ask before it trains: dense gradients, also from moved weights, and what linear maps read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kinds import Now, Place
from tests.conftest import calibration
from tests.toys.helpers import gradients, model_of, toys  # noqa: F401

DOWN = ("mlp_down",)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_calibration_gradients_are_those_of_full_tuning(engine: Any, now: Now, architecture: str) -> None:
    batches = calibration(8, "")
    run = engine({"lora": {"rank": 2}}, model=model_of(architecture))
    services = run.services("lora", now)
    places = run.tune.parts.select(roles=["linear", "norm", "embedding"])
    found = services.gradients(batches, places)
    assert run.tune.trained and all(one.gradient is None for one in run.tune.trained.values())
    assert not any(one.requires_grad for name, one in run.tune.model.named_parameters())
    whole = engine("full", model=model_of(architecture))
    wanted = gradients(whole, batches, now)
    for place in places:
        name = next(name for name in wanted if name == f"full/{place}" or name == f"full/{place.parameter}")
        gradient = wanted[name]
        if place.module in run.tune.parts.transposed and whole.tune.trained[name].form == "whole" and gradient.ndim == 2:
            gradient = gradient.T
        assert torch.allclose(found[place], gradient, atol=1e-12), place


def test_calibration_looks_from_moved_weights_and_puts_them_back(engine: Any, now: Now) -> None:
    run = engine("full")
    services = run.services("full", now)
    place = run.tune.parts.select(roles=DOWN, blocks=[1])[0]
    before = run.tune.region(place).clone()
    change = torch.randn(before.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    moved = services.gradients(calibration(8, ""), [place], {place: change})[place]
    assert torch.equal(run.tune.region(place), before)
    run.tune.set({f"full/{place}": before + change})
    assert torch.allclose(services.gradients(calibration(8, ""), [place])[place], moved, atol=1e-12)


def test_calibration_reads_real_tokens_alone(engine: Any, now: Now) -> None:
    run = engine(["plain_prompt", "lora"])
    seen: dict[Place, int] = {}
    batches = calibration(5, "")
    places = run.tune.parts.select(roles=["attention_query", "attention_key", "mlp_down"])

    def take(place: Place, x_NI: Tensor) -> None:
        assert not x_NI.requires_grad
        seen[place] = seen.get(place, 0) + len(x_NI)

    run.services("lora", now).inputs(batches, places, take)
    assert seen == dict.fromkeys(places, sum(batch.tokens for batch in batches))
