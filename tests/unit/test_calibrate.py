"""What a technique may ask before it trains: dense gradients, also from moved weights, and what linear maps read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.kinds import Now, Place
from luthier.models.quantized import BLOCK, QuantizedLinear
from luthier.training import calibrate
from tests.conftest import calibration
from tests.toys.helpers import gradients, model_of, toys  # noqa: F401
from tests.unit.test_kinds_resume import assert_equal, everything

DOWN = ("mlp_down",)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_calibration_gradients_are_those_of_full_tuning(engine: Any, now: Now, architecture: str) -> None:
    batches = calibration(8, "")
    run = engine({"lora": {"rank": 2}}, model=model_of(architecture))
    services = run.services("lora", now)
    places = run.tune.parts.select(target_modules=["linear", "norm", "embedding"])
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
    place = run.tune.parts.select(target_modules=DOWN, blocks=[1])[0]
    before = run.tune.region(place).clone()
    change = torch.randn(before.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    moved = services.gradients(calibration(8, ""), [place], {place: change})[place]
    assert torch.equal(run.tune.region(place), before)
    run.tune.set({f"full/{place}": before + change})
    assert torch.allclose(services.gradients(calibration(8, ""), [place])[place], moved, atol=1e-12)


def test_a_model_in_bf16_is_looked_at_from_steps_that_bf16_rounds_away(engine: Any, now: Now) -> None:
    """Changes were rounded into bf16 weights, so that gradients behind a small step were those before it; and they were added to what the
    model rounds, not to what optimizers hold."""
    places, wanted, found = [], {}, {}
    for dtype in (torch.float64, torch.bfloat16):
        model = model_of(tied=True).to(torch.bfloat16)
        run = engine("full", model=model.to(dtype), dtype=dtype)
        places = run.tune.parts.select(target_modules=("mlp_down", "embedding"))
        services = run.services("full", now)
        for name, one in run.tune.trained.items():
            run.tune.set({name: one.master.detach() * (1 + 2**-12)})
        # The fp64 model's masters are its weights: start them where the other's are.
        moved = {place: 2**-11 * services.weight(place).to(torch.float32 if dtype == torch.bfloat16 else dtype) for place in places}
        before = {name: one.clone() for name, one in run.tune.model.named_parameters()}
        kept = dict(run.tune.model.named_parameters())
        at = services.gradients(list(services.batches(8)), places, moved)
        (wanted if dtype == torch.float64 else found).update(at)
        assert all(one is kept[name] and torch.equal(one, before[name]) for name, one in run.tune.model.named_parameters())
        assert run.tune.model.lm_head.weight is run.tune.model.model.embed_tokens.weight
    for place in places:
        gap = float((found[place].double() - wanted[place]).norm() / wanted[place].norm())
        assert gap < 1e-4, (str(place), gap)


BY_GRADIENTS: dict[str, dict[str, Any]] = {
    "lora_sb": {"rank": 2},
    "s2ft": {"down": 0.2, "by": "gradient"},
    "neuroada": {"connections": 3, "by": "gradient"},
    "greentrainer": {"target": 0.7, "selections": 1},
}


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_what_is_chosen_before_training_follows_plain_cross_entropy(engine: Any, now: Now, name: str) -> None:
    """What the run minimizes, and what the model drops while it learns, leave the choice alone, as the technique's card says."""
    found: list[dict[str, Any]] = []
    for objective, dropped in (("cross_entropy", 0.0), ("poft", 0.5)):
        model = model_of()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropped
        model.train()
        found.append(everything(engine({name: BY_GRADIENTS[name]}, model=model, objective=objective)))
    assert_equal(*found)


def test_calibration_reads_real_tokens_alone(engine: Any, now: Now) -> None:
    run = engine(["plain_prompt", "lora"])
    seen: dict[Place, int] = {}
    batches = calibration(5, "")
    places = run.tune.parts.select(target_modules=["attention_query", "attention_key", "mlp_down"])

    def take(place: Place, x_NI: Tensor) -> None:
        assert not x_NI.requires_grad
        seen[place] = seen.get(place, 0) + len(x_NI)

    run.services("lora", now).inputs(batches, places, take)
    assert seen == dict.fromkeys(places, sum(batch.tokens for batch in batches))


class Doubled(torch.nn.Module):
    """A quantized map whose output something else doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.map = QuantizedLinear(torch.nn.Linear(BLOCK, 2), "int8")
        self.map.register_forward_hook(lambda module, given, y: 2 * y)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.scale * self.map(x_BI)


def test_a_change_of_a_quantized_weight_comes_before_what_edits_the_output() -> None:
    """It has the weight's gradient: here twice what was read."""
    model = Doubled()
    x_BI = torch.arange(2.0 * BLOCK).view(2, BLOCK)
    plain = model(x_BI)
    with calibrate._beside(SimpleNamespace(model=model), {"map.weight", "scale"}) as changes:  # type: ignore[arg-type]
        assert list(changes) == ["map.weight"] and not changes["map.weight"].any()
        change = changes["map.weight"].requires_grad_(True)
        assert torch.equal(model(x_BI), plain)
        (gradient,) = torch.autograd.grad(model(x_BI).sum(), change)
        with torch.no_grad():
            change[1] += 1.0
            assert torch.allclose(model(x_BI) - plain, torch.stack([torch.zeros(2), 2 * x_BI.sum(1)], 1), rtol=1e-4)
    assert torch.equal(gradient, 2 * x_BI.sum(0).expand(2, -1))
    assert torch.equal(model(x_BI), plain)


def test_places_that_no_gradient_reaches_are_named(engine: Any, now: Now) -> None:
    run = engine("full", model=model_of(layers=1))
    (head,) = run.tune.parts.select(target_modules=["head"])
    down = run.tune.parts.select(target_modules=DOWN)
    ask = lambda places: calibrate.gradients(  # noqa: E731
        run.tune, calibration(2, ""), places, {}, lambda hidden_ND, label_N: hidden_ND.sum(-1)
    )
    assert ask(down).keys() == set(down)
    with pytest.raises(LuthierError, match="no gradient reaches this place") as caught:
        ask([*down, head])
    assert caught.value.where == str(head)
