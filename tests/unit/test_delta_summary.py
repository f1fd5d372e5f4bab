"""The summary of a delta: hand-worked numbers, and totals that agree with the delta itself."""

from __future__ import annotations

import json

import pytest
import torch

from luthier.delta import Delta, LowRank, summary
from luthier.models import map_parts, tiny


def test_numbers_by_hand() -> None:
    base, tuned = tiny(), tiny()
    for model in (base, tuned):
        for parameter in model.parameters():
            parameter.data.fill_(2.0)
    name = "model.layers.1.self_attn.q_proj.weight"
    tuned.get_parameter(name).data[0, :4] = torch.tensor([5.0, -2.0, 14.0, 2.0])
    found = summary(Delta.between(base, tuned), map_parts(base), base)
    # Changes of 3, -4 and 12 in a matrix of 32 times 32 twos.
    assert [one for one in found["by_place"] if one["changed"]] == [
        {
            "block": 1,
            "module_type": "attention_query",
            "norm": 13.0,
            "base_norm": 64.0,
            "relative": 13 / 64,
            "parameters": 1024,
            "changed": 3,
        }
    ]
    total = sum(parameter.numel() for parameter in base.parameters())
    assert found["norm"] == 13.0 and found["changed_share"] == 3 / total
    assert found["relative"] == pytest.approx(13 / (2 * total**0.5), rel=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral"])
def test_places_cover_the_model_once(architecture: str) -> None:
    base, tuned = tiny(architecture, tied=True), tiny(architecture, tied=True, seed=1)
    delta = Delta.between(base, tuned)
    found = summary(delta, map_parts(base), base)
    places = found["by_place"]
    assert sum(one["parameters"] for one in places) == sum(parameter.numel() for parameter in base.parameters())
    assert sum(one["norm"] ** 2 for one in places) ** 0.5 == pytest.approx(delta.norm(), rel=1e-9)
    assert len({(one["block"], one["module_type"]) for one in places}) == len(places)
    if architecture in ("gpt2", "phi3"):
        roles = {one["module_type"] for one in places if one["block"] == 0}
        assert {"attention_query", "attention_key", "attention_value"} <= roles
    assert found["changed_share"] == pytest.approx(1.0, abs=1e-3)
    assert json.loads(json.dumps(found)) == found


def test_nothing_changed() -> None:
    base = tiny()
    found = summary(Delta.between(base, base), map_parts(base), base)
    assert found["norm"] == 0.0 and found["relative"] == 0.0 and found["changed_share"] == 0.0
    assert all(one["norm"] == 0.0 and one["changed"] == 0 for one in found["by_place"])


def test_a_base_of_zeros_has_no_relative_size() -> None:
    base, tuned = tiny("gpt2"), tiny("gpt2")
    base.get_parameter("transformer.ln_f.bias").data.zero_()
    base.get_parameter("transformer.ln_f.weight").data.zero_()
    tuned.load_state_dict(base.state_dict())
    tuned.get_parameter("transformer.ln_f.bias").data[0] = 1.0
    found = summary(Delta.between(base, tuned), map_parts(base), base)
    (norm,) = [one for one in found["by_place"] if one["module_type"] == "final_norm"]
    assert (norm["norm"], norm["base_norm"], norm["relative"]) == (1.0, 0.0, None)


def test_a_delta_of_a_tied_head_counts_as_the_head() -> None:
    base = tiny("llama", tied=True)
    shape = base.lm_head.weight.shape
    low = LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1]), 1.0, shape)
    found = summary(Delta({"lm_head.weight": (low,)}), map_parts(base), base)
    (head,) = [one for one in found["by_place"] if one["module_type"] == "head"]
    assert head["changed"] == head["parameters"] == shape.numel() and head["norm"] == pytest.approx(shape.numel() ** 0.5)
    assert all(one["changed"] == 0 for one in found["by_place"] if one["module_type"] != "head")
