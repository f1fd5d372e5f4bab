"""IA3 here and in PEFT: the same factors give the same logits and gradients, and merge to the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from luthier.kinds import Now
from luthier.methods.representation_edit.ia3 import ia3
from luthier.models import map_parts, tiny
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.tolerance import TINY, assert_rounded

peft = pytest.importorskip("peft")

# PEFT says that it sets `fan_in_fan_out` for GPT-2 by itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

IDS = torch.arange(6, 46).reshape(2, 20)
TARGETS = {"llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]), "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])}
OUTPUTS = {
    "llama": ("attention_key", "attention_value"),
    # PEFT scales the whole fused projection.
    "gpt2": ("attention_query", "attention_key", "attention_value"),
}


def both(architecture: str) -> tuple[Any, Tune, dict[str, Any]]:
    """PEFT's model with random factors, luthier's with the same, and PEFT's factors by module."""
    targets, feedforward = TARGETS[architecture]
    config = peft.IA3Config(
        target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=architecture == "gpt2", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(tiny(architecture), config).eval()
    rng = torch.Generator().manual_seed(6)
    factors = {}
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1.0 + 0.3 * torch.randn(parameter.shape, generator=rng)
            factors[name.removeprefix("base_model.model.").partition(".ia3_l")[0]] = parameter
    model = tiny(architecture)
    tune = Tune(model, map_parts(model))
    for value in ia3(outputs=OUTPUTS[architecture]):
        tune.add("ia3", value, RunServices(tune, "ia3", Now()), {})
    for own in tune.owns:
        assert own.place is not None
        tune.set({own.trained["scale"].name: factors[own.place.module].data.flatten()[own.place.start : own.place.stop] - 1.0})
    return theirs, tune, factors


@pytest.mark.parametrize("architecture", TARGETS)
def test_the_same_factors_give_the_same_logits_and_gradients(architecture: str) -> None:
    theirs, tune, factors = both(architecture)
    with torch.no_grad():
        one, other, base = (model(IDS).logits for model in (tune.model, theirs, tiny(architecture)))
    assert float((one - base).abs().max()) > 0.1
    assert_rounded(one, other, TINY)
    for model in (theirs, tune.model):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for own in tune.owns:
        assert own.place is not None
        expected = factors[own.place.module].grad.flatten()[own.place.start : own.place.stop]
        torch.testing.assert_close(own.trained["scale"].gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", TARGETS)
def test_merging_gives_what_peft_merges(architecture: str) -> None:
    theirs, tune, _ = both(architecture)
    tune.merge()
    expected = theirs.merge_and_unload().state_dict()
    for name, values in tune.model.state_dict().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", TARGETS)
def test_as_many_numbers_train(architecture: str) -> None:
    theirs, tune, _ = both(architecture)
    assert tune.numbers() == sum(one.numel() for one in theirs.parameters() if one.requires_grad)
