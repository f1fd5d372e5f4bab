"""Deltas between models: exact, tied tensors once, arithmetic, scaling by place, masks, and the refusal of another
base.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.delta import Delta, Dense, LowRank, Sparse
from luthier.delta.forms import bits
from luthier.errors import LuthierError
from luthier.kinds import Place
from luthier.models import fingerprint, map_parts, tiny


def perturbed(model: nn.Module, names: str = "", size: float = 0.01, seed: int = 0) -> Any:
    """A copy in which parameters whose name contains `names` have moved a little."""
    tuned = copy.deepcopy(model)
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if names in name:
            parameter.data += (size * torch.randn(parameter.shape, generator=rng)).to(parameter.dtype)
    return tuned


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(bits(left[name]), bits(right[name]))]
    assert different == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral"])
def test_apply_gives_the_tuned_model_and_remove_the_base_bit_for_bit(architecture: str, dtype: torch.dtype) -> None:
    base = tiny(architecture, dtype=dtype)
    tuned = perturbed(base)
    delta = Delta.between(base, tuned, name=architecture)
    model, before = tiny(architecture, dtype=dtype), weights(base)
    delta.apply(model)
    assert_same(weights(model), weights(tuned))
    with delta.off(model):
        assert_same(weights(model), before)
    assert_same(weights(model), weights(tuned))
    delta.remove(model)
    assert_same(weights(model), before)


def test_only_what_changed_is_kept() -> None:
    base = tiny()
    tuned = copy.deepcopy(base)
    tuned.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] += 1.0
    delta = Delta.between(base, tuned)
    assert list(delta) == ["model.layers.1.mlp.up_proj.weight"]
    (form,) = delta["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(form, Sparse) and form.index.tolist() == [3 * 32 + 4]
    assert len(Delta.between(base, base)) == 0 and Delta.between(base, base).norm() == 0.0


def test_norm_by_hand() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    delta = Delta.between(base, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0, 12.0])})
    assert delta.norm() == 13.0
    assert (delta * 2.0).norm() == 26.0 == (2.0 * delta).norm()


def test_tied_tensors_are_kept_once() -> None:
    base = tiny("llama", tied=True)
    delta = Delta.between(base, perturbed(base))
    assert "model.embed_tokens.weight" in list(delta) and "lm_head.weight" not in list(delta)
    model = tiny("llama", tied=True)
    delta.apply(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("moved", ["embed_tokens", "lm_head", "e"])
def test_a_head_that_is_no_longer_tied_is_untied_by_apply(moved: str) -> None:
    base = tiny("llama", tied=True)
    tuned = tiny("llama", tied=False)
    tuned.load_state_dict(base.state_dict())
    tuned = perturbed(tuned, moved)
    delta = Delta.between(base, tuned)
    model = tiny("llama", tied=True)
    delta.apply(model)
    assert_same(weights(model), weights(tuned))
    assert model.config.tie_word_embeddings is False
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, tuned(ids).logits)


def test_an_untied_head_stays_so_through_arithmetic() -> None:
    base, untied = tiny("llama", tied=True), tiny("llama", tied=False)
    untied.load_state_dict(base.state_dict())
    delta = Delta.between(base, perturbed(untied, "embed_tokens"))
    everything = delta.masked(lambda name, change: torch.ones_like(change, dtype=torch.bool))
    for same in (delta + delta, 2.0 * delta, everything, Delta.between(base, base) + delta):
        model = tiny("llama", tied=True)
        same.apply(model)
        assert torch.equal(model.lm_head.weight, base.lm_head.weight)
        assert not torch.equal(model.model.embed_tokens.weight, base.lm_head.weight)


def test_another_base_is_refused_by_name() -> None:
    base, other = tiny(seed=0), tiny(seed=1)
    delta = Delta.between(base, perturbed(base), name="the-base")
    before = weights(other)
    with pytest.raises(LuthierError, match=f"the-base.*float32, {fingerprint(base)[:12]}"):
        delta.apply(other)
    with pytest.raises(LuthierError, match="another"):
        delta.apply(tiny(seed=0, dtype=torch.bfloat16))
    assert_same(weights(other), before)
    delta.apply(other, force=True)
    name = "model.norm.weight"
    torch.testing.assert_close(weights(other)[name], before[name] + delta.spread(name))


def test_a_model_of_another_shape_is_refused_even_by_force() -> None:
    base = tiny()
    delta = Delta.between(base, perturbed(base))
    with pytest.raises(LuthierError, match="lacks a parameter") as error:
        delta.apply(tiny("gpt2"), force=True)
    assert error.value.where in delta.changes
    with pytest.raises(LuthierError, match="shape"):
        delta.remove(tiny(width=64))


def test_states_of_different_models_are_refused() -> None:
    with pytest.raises(LuthierError, match="lacks"):
        Delta.between(tiny("llama"), tiny("gpt2"))
    with pytest.raises(LuthierError, match="shapes differ"):
        Delta.between(tiny(width=32), tiny(width=64))
    with pytest.raises(LuthierError, match="cannot hold the tuned numbers"):
        Delta.between(tiny(dtype=torch.bfloat16), tiny(dtype=torch.float32))
    with pytest.raises(LuthierError, match="quantized"):
        Delta.between({"a": torch.tensor([1])}, {"a": torch.tensor([2])})


def test_a_narrower_tuned_model_fits_a_wider_base() -> None:
    base, tuned = tiny(), tiny(seed=1, dtype=torch.bfloat16)
    delta = Delta.between(base, tuned)
    delta.apply(base)
    assert_same(weights(base), weights(tuned.float()))


def test_a_model_can_be_compared_with_saved_files(tmp_path: Path) -> None:
    base = tiny("gpt2")
    tuned = perturbed(base)
    tuned.save_pretrained(tmp_path / "tuned")
    from_files = Delta.between(base, tmp_path / "tuned")
    from_models = Delta.between(base, tuned)
    assert list(from_files) == list(from_models)
    assert all(torch.equal(from_files.spread(name), from_models.spread(name)) for name in from_models)
    with pytest.raises(LuthierError, match="no safetensors"):
        Delta.between(base, tmp_path / "nothing")


def test_a_delta_cannot_be_changed() -> None:
    delta = Delta.between({"a": torch.zeros(1)}, {"a": torch.ones(1)})
    with pytest.raises(TypeError):
        delta.changes["a"] = ()  # type: ignore[index]
    with pytest.raises(AttributeError):
        delta.changes = {}  # type: ignore[misc]


def test_sum_difference_and_product_work_on_the_changes() -> None:
    base = tiny(dtype=torch.float64)
    one, two = (Delta.between(base, perturbed(base, "mlp", seed=seed)) for seed in (1, 2))
    model, before = tiny(dtype=torch.float64), weights(base)
    (one * 0.25 + two - 2.0 * one).apply(model)
    for name, values in weights(model).items():
        expected = before[name] + (two.spread(name) - 1.75 * one.spread(name) if name in one.changes else 0.0)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert (one - one).norm() == 0.0


def test_a_parameter_that_only_one_delta_changes_stays_exact_in_a_sum() -> None:
    base = tiny()
    up, down = perturbed(base, "up_proj", 1.0), perturbed(base, "down_proj", 1.0, seed=1)
    model = tiny()
    (Delta.between(base, up) + Delta.between(base, down)).apply(model)
    found = weights(model)
    both = {name: weights(up)[name] if "up_proj" in name else values for name, values in weights(down).items()}
    assert_same(found, both)


def test_deltas_of_different_bases_do_not_add() -> None:
    one, other = (Delta.between(tiny(seed=seed), tiny(seed=9), name=f"base{seed}") for seed in (0, 1))
    with pytest.raises(LuthierError, match=r"base0.*base1"):
        _ = one + other


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_scaling_by_place_reaches_the_parts_of_fused_projections(architecture: str) -> None:
    base = tiny(architecture)
    parts = map_parts(base)
    delta = Delta.between(base, perturbed(base))

    def factor(place: Place) -> float:
        return {"attention_key": 0.0, "mlp_up": 0.5}.get(place.role, 1.0) * (2.0 if place.block == 1 else 1.0)

    expected = tiny(architecture)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(delta.spread(name))
        for place in parts.places:
            parts.view(expected, place).mul_(factor(place))
    scaled = delta.scaled(factor, parts)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(scaled.spread(name), parameter.data, rtol=0, atol=0)


def test_scaling_low_ranks_by_place_keeps_them_low_rank() -> None:
    parts = map_parts(tiny("phi3"))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    rows = parts.select("attention_value", blocks=[0])[0]
    shape = tiny("phi3").get_parameter(name).shape
    up_OR, down_RI = torch.ones(shape[0], 2), torch.ones(2, shape[1])
    delta = Delta({name: (LowRank(up_OR, down_RI, 0.5, shape),)})
    scaled = delta.scaled(lambda place: 3.0 if place.role == "attention_value" else 0.0, parts)
    (form,) = scaled[name]
    assert isinstance(form, LowRank)
    expected = torch.zeros(shape)
    expected[rows.start : rows.stop] = 3.0
    assert torch.equal(form.spread(), expected)


def test_an_unscaled_change_stays_exact() -> None:
    base = tiny(dtype=torch.bfloat16)
    tuned = perturbed(base, size=1.0)
    model = tiny(dtype=torch.bfloat16)
    Delta.between(base, tuned).scaled(lambda place: 1.0, map_parts(base)).apply(model)
    assert_same(weights(model), weights(tuned))


def test_scaling_with_the_map_of_another_model_is_refused() -> None:
    base = tiny()
    with pytest.raises(LuthierError, match="not in the model's map"):
        Delta.between(base, perturbed(base)).scaled(lambda place: 1.0, map_parts(tiny("gpt2")))


def test_masking_keeps_the_chosen_entries() -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(2)}
    delta = Delta.between(base, {"a": torch.tensor([1.0, -2.0, 3.0, -4.0]), "b": torch.ones(2)})
    kept = delta.masked(lambda name, change: (change.abs() > 2.5) & (name == "a"))
    assert kept.spread("a").tolist() == [0.0, 0.0, 3.0, -4.0] and kept.spread("b").tolist() == [0.0, 0.0]
    assert isinstance(delta["b"][0], Dense)
