"""Prefix tuning here and in PEFT: the same keys and values give the same logits.

PEFT counts the prefix among the positions: tokens stand behind it. Here they do not, so the tests turn PEFT's keys back by the
prefix's length where positions are rotations, and hand PEFT a shifted table where they are embeddings.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from luthier.kinds import Now
from luthier.methods.prefix.prefix_tuning import Reparameterization, prefix_tuning
from luthier.models import map_parts, tiny
from luthier.training.services import RunServices
from luthier.tune import Tune

peft = pytest.importorskip("peft")

IDS = torch.arange(6, 46).reshape(2, 20)
LENGTH, HIDDEN = 5, 12


def peft_model(model: Any, projects: bool) -> Any:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=projects, encoder_hidden_size=HIDDEN
    )
    theirs = peft.get_peft_model(model.double(), config).eval()
    rng = torch.Generator().manual_seed(6)
    for parameter in theirs.prompt_encoder.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=rng).double()
    return theirs


def keys_and_values(theirs: Any) -> Tensor:
    """PEFT's keys and values, [L, 2, H, P, W]."""
    config = theirs.active_peft_config
    with torch.no_grad():
        made = theirs.prompt_encoder["default"](torch.arange(LENGTH)[None])[0]
    shape = (LENGTH, config.num_layers, 2, config.num_attention_heads, -1)
    return made.reshape(shape).permute(1, 2, 3, 0, 4)


def tuned(architecture: str, reparameterization: Reparameterization) -> Tune:
    model = tiny(architecture).double()
    tune = Tune(model, map_parts(model))
    value = prefix_tuning(length=LENGTH, hidden=HIDDEN, reparameterization=reparameterization)
    tune.add("prefix", value, RunServices(tune, "prefix", Now()), {})
    return tune


def turned_back(model: Any, key_LHPW: Tensor) -> Tensor:
    """Keys rotated by minus the prefix's length: what they are to a query that is not shifted by it."""
    cos, sin = model.model.rotary_emb(key_LHPW, torch.tensor([[LENGTH]]))
    return key_LHPW * cos.double() - rotate_half(key_LHPW) * sin.double()


def assert_same(theirs: Any, tune: Tune, architecture: str) -> None:
    with torch.no_grad():
        one, other, base = (model(IDS).logits for model in (tune.model, theirs, tiny(architecture).double()))
    assert float((one - base).abs().max()) > 0.1
    # Rotations are computed in fp32.
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_same_keys_and_values_give_the_same_logits_with_rotated_positions_and_grouped_queries() -> None:
    theirs = peft_model(tiny("llama"), projects=False)
    tune = tuned("llama", "none")
    made = keys_and_values(theirs)
    assert made.shape[2] == tune.parts.key_value_heads < tune.parts.heads
    tune.set({"prefix.key": turned_back(tune.model, made[:, 0]), "prefix.value": made[:, 1]})
    assert_same(theirs, tune, "llama")


@pytest.mark.parametrize("projects", [False, True])
def test_the_same_keys_and_values_give_the_same_logits_with_a_table_of_positions(projects: bool) -> None:
    model = tiny("gpt2")
    table = model.transformer.wpe.weight.data
    table.copy_(table.roll(LENGTH, 0))
    theirs = peft_model(model, projects)
    tune = tuned("gpt2", "network" if projects else "none")
    if projects:
        encoder = theirs.prompt_encoder["default"]
        first, _, second = encoder.transform
        shape = tune.trained["prefix.up"].master.shape
        values = {
            "embedding": encoder.embedding.weight,
            "down": first.weight,
            "down_bias": first.bias,
            "up": second.weight.reshape(shape),
            "up_bias": second.bias,
        }
        tune.set({f"prefix.{name}": value.detach() for name, value in values.items()})
    else:
        made = keys_and_values(theirs)
        tune.set({"prefix.key": made[:, 0], "prefix.value": made[:, 1]})
    assert_same(theirs, tune, "gpt2")
