"""SSF against its algebra: what it computes, what its gradients are, what it folds into, and what it becomes when parts are left out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.methods.representation_edit.ia3 import ia3
from luthier.methods.representation_edit.ssf import ssf
from tests.conftest import make_batch
from tests.toys.helpers import gradients, logits_of, model_of, plain_gradients, rows_of_eight

BATCH = make_batch([(7, 3), (7, 4)])


def moved(run: Any, seed: int = 3) -> Any:
    """The run with everything that trains at random values."""
    rng = torch.Generator().manual_seed(seed)
    run.tune.set({name: 0.3 * torch.randn(one.master.shape, generator=rng).double() for name, one in run.tune.trained.items()})
    return run


def test_two_channels_by_hand() -> None:
    (edit,) = ssf()
    tensors = {"scale": torch.tensor([2.0, 0.5]) - 1, "shift": torch.tensor([1.0, 0.0])}
    y = torch.tensor([1.0, 2.0])
    assert edit.apply(tensors, y, y).tolist() == [3.0, 1.0]


def test_small_scales_survive_narrow_types() -> None:
    (edit,) = ssf()
    y = torch.full((1,), 256.0, dtype=torch.bfloat16)
    # 1 + 2^-8 is 1 in bf16, but 256 + 2 is not 256: y (gamma - 1) must be made before the sum.
    assert float(edit.apply({"scale": torch.full((1,), 2.0**-7, dtype=torch.bfloat16)}, y, y)) == 258.0
    assert float(edit.apply({"scale": torch.full((1,), 1.5 * 2.0**-8, dtype=torch.bfloat16)}, y, y)) == 258.0
    assert float(y * (1 + torch.full((1,), 1.5 * 2.0**-9, dtype=torch.bfloat16))) == 256.0


@pytest.mark.parametrize("layers", [1, 3])
def test_the_number_of_trained_numbers_is_the_papers(engine: Any, layers: int) -> None:
    model = model_of("gpt2", layers=layers, tied=False)
    run = engine(ssf(target_modules=("linear", "norm", "embedding")), model=model)
    width, inner = run.tune.parts.width, model.config.n_inner
    assert run.tune.numbers() == layers * 2 * (7 * width + inner) + 2 * width + 2 * width
    # The same count for the paper's ViT-B/16, with its patch embedding and final norm.
    assert 12 * 2 * (7 * 768 + 3072) + 2 * 768 + 2 * 768 == 205_824


FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "phi3", "gpt_neox", "opt"]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_merged_and_beside_the_weights_it_is_the_same_model(engine: Any, architecture: str) -> None:
    model = model_of(architecture)
    base = {name: one.detach().clone() for name, one in model.named_parameters()}
    run = moved(engine(ssf(shift="foldable"), model=model))
    wanted = logits_of(model, BATCH)
    assert float((wanted - logits_of(model_of(architecture), BATCH)).abs().max()) > 1e-2
    run.tune.merge()
    # Gemma's norms multiply in fp32, whatever the model's type.
    close = 1e-5 if "gemma" in architecture else 1e-10
    assert torch.allclose(logits_of(model, BATCH), wanted, rtol=close, atol=close)
    run.tune.unmerge()
    assert all(torch.equal(one, base[name]) for name, one in model.named_parameters())


def test_in_fp32_merging_is_exact_to_rounding(engine: Any) -> None:
    run = moved(engine(ssf(), model=model_of("gpt2"), dtype=torch.float32))
    wanted = logits_of(run.tune.model, BATCH)
    run.tune.merge()
    assert torch.allclose(logits_of(run.tune.model, BATCH), wanted, rtol=1e-5, atol=1e-5)


def test_an_untied_embedding_and_head_fold_too(engine: Any) -> None:
    run = moved(engine(ssf(target_modules=("embedding", "head"), shift="foldable"), model=model_of(tied=False)))
    assert {name.rpartition(".")[2] for name in run.tune.trained} == {"scale", "shift"}
    wanted = logits_of(run.tune.model, BATCH)
    run.tune.merge()
    assert torch.allclose(logits_of(run.tune.model, BATCH), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("role", ["embedding", "head"])
def test_a_tied_embedding_is_not_folded_since_the_head_would_feel_it(engine: Any, role: str) -> None:
    model = model_of("gpt2", tied=True)
    run = moved(engine(ssf(target_modules=(role,)), model=model))
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    with pytest.raises(LuthierError, match="cannot be merged into the weights"):
        run.tune.merge()
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())


def test_a_shift_without_a_bias_trains_and_is_refused_by_name_when_merged(engine: Any) -> None:
    run = moved(engine(ssf(shift="everywhere"), model=model_of()))
    before = {name: one.detach().clone() for name, one in run.tune.model.named_parameters()}
    shifts = {name for name in run.tune.trained if name.endswith(".shift")}
    assert len(shifts) == len(run.tune.trained) / 2 == 2 * (7 + 2) + 1
    with pytest.raises(LuthierError, match="needs a bias that this model lacks"):
        run.tune.merge()
    assert all(torch.equal(one, before[name]) for name, one in run.tune.model.named_parameters())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_every_channel_that_is_scaled_is_shifted(engine: Any, architecture: str) -> None:
    """Of models without biases, as most are, nothing was shifted unless it was asked for."""
    trained = engine("ssf", model=model_of(architecture)).tune.trained
    shifts, scales = ({name for name in trained if name.endswith(what)} for what in (".shift", ".scale"))
    assert scales and {name.removesuffix(".shift") for name in shifts} == {name.removesuffix(".scale") for name in scales}


def test_shifts_stand_where_a_bias_can_take_them(engine: Any) -> None:
    run = engine(ssf(shift="foldable"), model=model_of("qwen2"))
    shifted = {one.place.role for one in run.tune.trained.values() if one.name.endswith(".shift")}
    assert shifted == {"attention_query", "attention_key", "attention_value"}
    assert not [name for name in engine(ssf(shift="none"), model=model_of("gpt2")).tune.trained if name.endswith(".shift")]


def test_gradients_are_those_of_biases_and_of_scaled_weights(engine: Any, now: Any) -> None:
    # y = W z + b: the sum of dy over tokens is db, the sum of y dy is the sum of W dW over inputs, and b db.
    batch = make_batch([(9, 4), (9, 8)])
    plain = plain_gradients(model_of("gpt2"), batch)
    run = engine(ssf(), model=model_of("gpt2"))
    found = gradients(run, [batch], now)
    weights = dict(model_of("gpt2").named_parameters())
    checked = 0
    for one in run.tune.trained.values():
        place = one.place
        part = slice(place.start, place.stop)
        weight, bias = weights[f"{place.module}.weight"], weights[f"{place.module}.bias"]
        bias_gradient = plain[f"{place.module}.bias"]
        if one.name.endswith(".shift"):
            expected = bias_gradient[part]
        else:
            product = weight * plain[f"{place.module}.weight"]
            expected = ((product.sum(0) if product.ndim == 2 else product) + bias * bias_gradient)[part]
        assert torch.allclose(found[one.name], expected, rtol=1e-8, atol=1e-12), one.name
        checked += 1
    # Query, key, value, output, up, down and two norms in both blocks, and the last norm, each with a scale and a shift.
    assert checked == 2 * (2 * 8 + 1)


def test_only_scales_on_keys_and_values_are_ia3_there(engine: Any) -> None:
    roles = ("attention_key", "attention_value")
    one, other = (
        engine(ssf(target_modules=roles, shift="none"), model=model_of()),
        engine(ia3(outputs=roles, inputs=()), model=model_of()),
    )
    assert list(one.tune.trained) == list(other.tune.trained)
    assert torch.equal(*[logits_of(moved(run).tune.model, BATCH) for run in (one, other)])


def logits_at(engine: Any, value: Any, model: Any, scale: Tensor) -> Tensor:
    run = engine(value, model=model)
    run.tune.set(dict.fromkeys(run.tune.trained, scale))
    return logits_of(model, BATCH)


@pytest.mark.parametrize(
    ("architecture", "role", "same"),
    [("llama", "mlp_up", True), ("llama", "mlp_gate", False), ("gpt2", "mlp_up", False), ("opt", "mlp_up", True)],
)
def test_before_a_nonlinearity_it_is_not_ia3_behind_it(engine: Any, architecture: str, role: str, same: bool) -> None:
    """The `up` of a gated MLP, and ReLU with positive factors, let a factor through; SiLU and GELU do not."""
    config = model_of(architecture).config
    width = getattr(config, {"llama": "intermediate_size", "gpt2": "n_inner", "opt": "ffn_dim"}[architecture])
    scale = 0.5 * torch.rand(width, generator=torch.Generator().manual_seed(2)).double()
    one = logits_at(engine, ssf(target_modules=(role,), shift="none"), model_of(architecture), scale)
    other = logits_at(engine, ia3(outputs=(), inputs=("mlp_down",)), model_of(architecture), scale)
    assert torch.allclose(one, other, rtol=0, atol=1e-11) == same


def test_decay_would_pull_to_the_base_and_by_default_there_is_none(engine: Any, now: Any) -> None:
    run = engine(ssf(target_modules=("mlp_down",), shift="none"), model=model_of(), optimizer={"adamw": {"weight_decay": 0.05}})
    (edit,) = ssf()
    ones = torch.ones(32).double()

    def gamma_after(decays: bool) -> Tensor:
        for one in run.tune.trained.values():
            one.decay = decays
            run.tune.set({one.name: torch.full_like(one.master, 0.5)})
        for i in range(1000):
            for one in run.tune.trained.values():
                one.gradient = torch.zeros_like(one.master.detach())
            run.chain.step(now._replace(step=i, learning_rate=1e-3))
        return edit.apply(run.tune.owns[0].masters(), ones, ones)

    assert not any(one.decay for one in run.tune.trained.values())
    assert torch.equal(gamma_after(decays=False), 1.5 * ones)
    # A decay on gamma itself would pull 1 to 0.9512; this one pulls 1.5 to 1 + 0.5 * 0.9512.
    assert torch.allclose(gamma_after(decays=True), (1 + 0.5 * (1 - 5e-5) ** 1000) * ones, rtol=0, atol=1e-9)
    assert abs((1 - 5e-5) ** 1000 - 0.9512) < 5e-5


def test_the_papers_noisy_start_is_an_option(engine: Any) -> None:
    run = engine(ssf(noise=0.02), model=model_of("gpt2"))
    for kind in ("scale", "shift"):
        values = torch.cat([one.master.detach().flatten() for one in run.tune.trained.values() if one.name.endswith(kind)])
        assert abs(float(values.std()) - 0.02) < 2e-3 and abs(float(values.mean())) < 2e-3
    assert float((logits_of(run.tune.model, BATCH) - logits_of(model_of("gpt2"), BATCH)).abs().max()) > 1e-3


def test_training_moves_scales_and_shifts_alone(engine: Any, now: Any) -> None:
    model = model_of("gpt2")
    base = {name: one.detach().clone() for name, one in copy.deepcopy(model).named_parameters()}
    run = engine(ssf(), model=model, optimizer="adamw")
    for i in range(3):
        run.step([rows_of_eight()], now._replace(step=i, learning_rate=1e-3))
    assert all(torch.equal(one, base[name]) for name, one in model.named_parameters())
    # A key's shift adds the same to all scores of a query, and softmax takes it out again.
    assert all(bool(one.master.any()) for name, one in run.tune.trained.items() if one.place.role != "attention_key")


@pytest.mark.parametrize(
    ("options", "said"), [({"target_modules": ("expert",)}, "`expert` do not fold"), ({"noise": -1.0}, "noise is -1")]
)
def test_impossible_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LuthierError, match=said):
        ssf(**options)


def test_naming_nothing_is_refused() -> None:
    for make in (lambda: ssf(target_modules=()), lambda: ia3(outputs=(), inputs=())):
        with pytest.raises(LuthierError, match="nothing is scaled"):
            make()
