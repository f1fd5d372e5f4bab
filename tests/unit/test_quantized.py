"""Bases whose matrices are held in 8 or 4 bits: exact codes, bounded errors, and everything that stands beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier import registry
from luthier.errors import LuthierError
from luthier.export.model import divergence, outputs
from luthier.kinds import Now
from luthier.methods.weight_delta.lora import lora
from luthier.models.load import load_model
from luthier.models.parts import map_parts
from luthier.models.quantized import (
    BLOCK,
    NORMAL_FLOATS,
    SCHEMES,
    QuantizedLinear,
    count,
    expand,
    put,
    quantize,
    quantized,
)
from luthier.models.tiny import ARCHITECTURES, tiny
from luthier.planning.estimate import standing
from luthier.recipe import make_recipe
from luthier.training import calibrate
from luthier.training.checkpoint import TENSORS, restore, save
from luthier.training.services import RunServices
from luthier.tune import Tune
from tests.conftest import calibration, make_batch, split
from tests.tolerance import TINY, assert_rounded
from tests.toys.helpers import toys  # noqa: F401

BESIDE = [name for kind in ("weight_delta", "representation_edit", "prefix", "prompt") for name in registry.names(kind)]
IDS = [[5, 9, 200, 31, 77, 8, 4], [14, 15]]
ROWS = [(9, 4), (6, 5), (12, 2), (5, 1)]


def linear(weight: Any, scheme: str, bias: Tensor | None = None) -> QuantizedLinear:
    """A quantized linear map of a weight [O, I]."""
    weight_OI = torch.as_tensor(weight)
    dense = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias is not None)
    dense.weight.data = weight_OI
    if bias is not None:
        dense.bias.data = bias
    return QuantizedLinear(dense, scheme)


def held(architecture: str = "llama", scheme: str = "nf4", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny quantized model."""
    model = tiny(architecture, seed=1, layers=2, dtype=dtype)
    quantize(model, map_parts(model), scheme)
    return model


def twin(model: Any) -> Any:
    """The same numbers in a dense model of its own."""
    dense = tiny(model.config.model_type, seed=1, layers=2, dtype=model.dtype)
    put(dense, {name: module.expanded(model.dtype) for name, module in quantized(model).items()})
    return dense


def codes(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def tuned(model: Any, train: float = 0.05, **techniques: Any) -> Tune:
    """A tune whose trained numbers moved by noise."""
    tune = Tune(model, map_parts(model))
    for slot, technique in techniques.items():
        tune.add(slot, technique, RunServices(tune, slot, Now(seed=0)), {})
    rng = torch.Generator().manual_seed(3)
    tune.set(
        {name: one.master.detach() + train * torch.randn(one.master.shape, generator=rng) for name, one in tune.trained.items()}
    )
    return tune


def test_int8_by_hand() -> None:
    one = linear([[127.0, -63.6, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.0, 0.02, 0.031]], "int8")
    assert one.codes.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0], [-127, 50, 1, 2]]
    assert torch.allclose(one.scales, torch.tensor([1.0, 0.0, 0.02]), rtol=1e-6)
    wanted = torch.tensor([[127.0, -64.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.0, 0.02, 0.04]])
    assert torch.allclose(one.dequantized(), wanted, rtol=1e-6)


def test_nf4_by_hand() -> None:
    """Levels come back as they were, others as the nearest, and a block that ends early or is zero is no exception."""
    levels = torch.tensor(NORMAL_FLOATS)
    near = torch.tensor([0.03, 0.05, -0.84, -0.86, 0.9, 0.8])
    weight = torch.zeros(3, 48)
    weight.view(-1)[:16] = 2 * levels
    weight.view(-1)[16:22] = 2 * near
    weight.view(-1)[128] = -0.5
    one = linear(weight, "nf4")
    assert one.scales.tolist() == [2.0, 0.0, 0.5]
    assert bytes(one.codes.tolist())[:11].hex() == "0123456789abcdef" + "781" + "0fe"
    wanted = torch.zeros(3, 48)
    wanted.view(-1)[:16] = 2 * levels
    wanted.view(-1)[16:22] = 2 * levels[[7, 8, 1, 0, 15, 14]]
    wanted.view(-1)[128] = -0.5
    assert torch.equal(one.dequantized(), wanted)


def test_nf4_levels_are_the_papers() -> None:
    """Appendix E: means of neighboring quantiles of the normal distribution, 8 from zero up, 7 below, largest 1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    made = torch.cat([above, torch.zeros(1), below]).sort().values
    assert torch.allclose(made / made.max(), torch.tensor(NORMAL_FLOATS, dtype=torch.float64), atol=1e-6)


def test_nf4_codes_are_those_of_bitsandbytes() -> None:
    """What bitsandbytes 0.50.2 makes of the same numbers, all of which are exact in fp32."""
    weight = ((torch.arange(4 * 48) * 37 % 101) - 50).reshape(4, 48).float() / 64
    one = linear(weight, "nf4")
    assert bytes(one.codes.tolist()).hex() == (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d"
        "18e2a04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af"
    )
    assert (64 * one.scales).tolist() == [50.0, 50.0, 50.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_number_moves_by_more_than_half_a_step(scheme: str, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 56, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    one = linear(weight, scheme)
    wide = weight.to(one.scales.dtype)
    error = (one.dequantized() - wide).abs()
    steps = torch.tensor(NORMAL_FLOATS, dtype=wide.dtype).diff() / 2
    if scheme == "int8":
        bound = (wide.abs().amax(1, keepdim=True) / 254).expand_as(wide)
    else:
        bound = (wide.view(-1, BLOCK).abs().amax(1, keepdim=True) * steps.max()).expand(-1, BLOCK).reshape(wide.shape)
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 0.3 * bound.max(), "the bound is not idle"
    again = linear(one.dequantized(), scheme)
    assert torch.equal(again.codes, one.codes) and torch.allclose(again.dequantized(), one.dequantized(), rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_product_and_its_derivatives_are_the_dense_ones(scheme: str) -> None:
    """Forward, backward, forward mode and a batch of vectors, against the dequantized weight in fp64."""
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(12, 20, generator=rng).double(), torch.randn(12, generator=rng).double()
    one = linear(weight, scheme, bias)
    dense_OI = one.dequantized()
    x = torch.randn(3, 5, 20, generator=rng).double()
    assert torch.equal(one(x), functional.linear(x, dense_OI, bias))
    assert torch.autograd.gradcheck(lambda x: one(x), (x.requires_grad_(),), check_forward_ad=True, check_batched_grad=True)
    (found,) = torch.autograd.grad(one(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(functional.linear(x, dense_OI, bias).square().sum(), x)
    assert torch.allclose(found, wanted, atol=1e-12)
    to_bias = torch.autograd.grad(one(x).square().sum(), one.bias)[0]
    assert torch.allclose(to_bias, 2 * one(x).sum((0, 1)), atol=1e-12)
    each = torch.func.vmap(one)(x.detach())
    assert torch.allclose(each, one(x), atol=1e-12)


def test_casting_a_model_leaves_the_numbers_of_its_base() -> None:
    model = held()
    before = {name: module.dequantized() for name, module in quantized(model).items()}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert same({name: module.dequantized() for name, module in quantized(model).items()}, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_map_stays_and_so_does_what_is_outside_the_blocks(architecture: str) -> None:
    model = tiny(architecture, seed=1, layers=2)
    parts, numbers, before = map_parts(model), count(model), dict(model.named_parameters())
    quantize(model, parts, "nf4")
    assert map_parts(model) == parts and count(model) == numbers
    # Fused places have one matrix; experts are stacks of matrices, and routers decide which of them are used.
    wanted = {p.module for p in parts.places if p.block is not None and p.tensor == "weight" and p.parameter in before}
    wanted = {name for name in wanted if before[f"{name}.weight"].ndim == 2}
    wanted -= {p.module for p in parts.places if p.role == "router"}
    assert set(quantized(model)) == wanted and wanted
    left = dict(model.named_parameters())
    assert all(left[name] is one for name, one in before.items() if name in left)
    assert before.keys() - left.keys() == {f"{name}.weight" for name in wanted}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_beside_codes_has_the_gradients_it_has_beside_the_same_dense_weights(
    engine: Any, now: Now, architecture: str, scheme: str
) -> None:
    from tests.toys.helpers import gradients

    model = held(architecture, scheme)
    dense = twin(model)
    batches = split(make_batch(ROWS), (3, 1))
    runs = [engine(tune="lora", model=one, dtype=torch.float32) for one in (model, dense)]
    for run in runs:
        rng = torch.Generator().manual_seed(1)
        values = {name: 0.1 * torch.randn(one.master.shape, generator=rng) for name, one in run.tune.trained.items()}
        run.tune.set(values)
    left, right = (gradients(run, batches, now) for run in runs)
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        assert value.abs().max() > 0, name
        assert_rounded(value, right[name], TINY, size=max(1.0, float(value.abs().max())), what=name)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    recomputed = gradients(runs[0], batches, now)
    for name, value in left.items():
        assert_rounded(recomputed[name], value, TINY, what=name)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_training_starts_at_the_quantized_base(architecture: str, scheme: str) -> None:
    model = held(architecture, scheme)
    base = outputs(model, IDS)
    for dense, quantum in zip(outputs(twin(model), IDS), base, strict=True):
        assert_rounded(dense, quantum, TINY)
    tune = tuned(model, 0.0, lora=lora())
    assert all(torch.equal(now, then) for now, then in zip(outputs(model, IDS), base, strict=True))
    tune.set({name: one.master.detach() + 0.1 for name, one in tune.trained.items()})
    assert not torch.allclose(outputs(model, IDS)[0], base[0], atol=1e-3)
    with tune.off():
        assert all(torch.equal(now, then) for now, then in zip(outputs(model, IDS), base, strict=True))
    assert not tune.altered and all(one.start is None for one in tune.trained.values()), "the base is kept nowhere else"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", BESIDE)
def test_whatever_stands_beside_trains_and_leaves_the_codes(
    engine: Any, now: Now, name: str, architecture: str, scheme: str
) -> None:
    try:
        dense = engine(tune=name, model=tiny(architecture, seed=1, layers=2), dtype=torch.float32, optimizer="adamw")
    except LuthierError as refusal:
        # What this architecture cannot have at all is refused in the same words.
        with pytest.raises(LuthierError) as found:
            engine(tune=name, model=held(architecture, scheme), dtype=torch.float32)
        assert found.value.what == refusal.what
        return
    model = held(architecture, scheme)
    base, before = outputs(model, IDS), codes(model)
    run = engine(tune=name, model=model, dtype=torch.float32, optimizer="adamw")
    assert list(run.tune.trained) == list(dense.tune.trained)
    masters = {key: one.master.detach().clone() for key, one in run.tune.trained.items()}
    for step in range(2):
        result = run.step(split(make_batch(ROWS, seed=step), (3, 1)), now._replace(step=step, learning_rate=0.01))
        assert math.isfinite(result.loss)
    assert any(not torch.equal(one.master, masters[key]) for key, one in run.tune.trained.items() if key in masters)
    assert same(codes(model), before)
    with run.tune.off():
        assert all(torch.equal(now, then) for now, then in zip(outputs(model, IDS), base, strict=True))


@pytest.mark.parametrize("name", registry.names("selective"))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_trains_the_weights_themselves_is_refused_by_name(engine: Any, name: str, scheme: str) -> None:
    with pytest.raises(LuthierError) as refusal:
        engine(tune=name, model=held(scheme=scheme), dtype=torch.float32)
    assert f"`{name}`" in refusal.value.what and f"{SCHEMES[scheme].bits} bits" in refusal.value.what
    assert refusal.value.where == "model.layers.0.self_attn.q_proj.weight"
    assert "lora" in str(refusal.value.fix) and "quantize: none" in str(refusal.value.fix)


def test_a_start_that_comes_out_of_the_weights_is_refused_by_name(engine: Any) -> None:
    with pytest.raises(LuthierError, match=r"`svd_start` takes its start out of the weights.* 4 bits") as refusal:
        engine(tune="svd_start", model=held(), dtype=torch.float32)
    assert "quantize: none" in str(refusal.value.fix)


@pytest.mark.parametrize("tune", ["lora", "loca", ["lora_sb", "ia3"]])
def test_a_resumed_run_is_the_uninterrupted_one_and_its_checkpoints_hold_no_base(
    engine: Any, now: Now, tmp_path: Path, tune: Any
) -> None:
    def build() -> Any:
        run = engine(tune=tune, model=held(), dtype=torch.float32, optimizer="adamw")
        run.tune.model.train()
        return run

    def go(run: Any, first: int, last: int) -> None:
        for step in range(first, last):
            run.step(split(make_batch(ROWS, seed=step), (3, 1)), now._replace(step=step, learning_rate=0.01))

    run = build()
    go(run, 0, 2)
    save(tmp_path / "step-2", run, {"step": 2})
    assert b"codes" not in (tmp_path / "step-2" / TENSORS).read_bytes()
    go(run, 2, 4)
    fresh = build()
    assert restore(tmp_path / "step-2", fresh) == {"step": 2}
    go(fresh, 2, 4)
    assert same({k: v.master for k, v in fresh.tune.trained.items()}, {k: v.master for k, v in run.tune.trained.items()})
    assert same(codes(fresh.tune.model), codes(run.tune.model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_for_calibration_are_those_of_the_same_dense_weights(architecture: str) -> None:
    model = held(architecture, dtype=torch.float64)
    found = []
    for one in (model, twin(model)):
        tune = Tune(one, map_parts(one))
        places = tune.parts.select(target_modules=["linear"], blocks=[1])
        moved = {places[0]: torch.full(tune.region(places[0]).shape, 0.01, dtype=torch.float64)}
        head = one.get_output_embeddings()
        before = codes(one)
        found.append(
            calibrate.gradients(
                tune,
                calibration(4, ""),
                places,
                moved,
                lambda x, y, head=head: functional.cross_entropy(head(x), y, reduction="none"),
            )
        )
        assert same(codes(one), before) and not any(module._forward_hooks for module in quantized(one).values())
    assert found[0].keys() == found[1].keys()
    for place, gradient in found[0].items():
        assert gradient.abs().max() > 0 and torch.allclose(gradient, found[1][place], rtol=1e-9, atol=1e-12), place


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("nf4", 4)])
def test_bytes_are_those_of_codes_and_scales(engine: Any, scheme: str, bits: int) -> None:
    """Codes of so many bits, and 32 bits of scale for a row or for 64 numbers."""
    model = tiny("llama", seed=1, layers=2)
    dense = sum(one.nbytes for one in model.parameters())
    quantize(model, map_parts(model), scheme)
    modules = list(quantized(model).values())
    numbers = sum(one.numbers for one in modules)
    scales = sum(one.out_features if scheme == "int8" else one.numbers // BLOCK for one in modules)
    took = numbers * bits // 8 + 4 * scales
    assert sum(one.codes.nbytes + one.scales.nbytes for one in modules) == took
    run = engine(tune="lora", model=model, dtype=torch.float32)
    assert standing(run)["weights"] == dense - 4 * numbers + took


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_dense_waits_for_backward(scheme: str) -> None:
    one = linear(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), scheme)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        one(torch.ones(2, 64, requires_grad=True))
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == {
        tensor.untyped_storage().data_ptr() for tensor in (one.codes, one.scales)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fault_24_merging_into_a_quantized_base_keeps_the_outputs(architecture: str, scheme: str, dtype: torch.dtype) -> None:
    """Fault 24: KL(merged, unmerged) is far below KL(merged, base); unmerging restores every code; merging twice is refused."""
    model = held(architecture, scheme, dtype)
    before = codes(model)
    tune = tuned(model, 0.1, lora=lora(), ia3=registry.part("ia3").values[0])
    unmerged = outputs(model, IDS)
    with tune.off():
        base = outputs(model, IDS)
    tune.merge()
    try:
        assert not quantized(model)
        merged = outputs(model, IDS)
        far = divergence(merged, base)
        assert divergence(merged, unmerged) < (1e-9 if dtype == torch.float32 else 0.01 * far) and far > 1e-4
        with pytest.raises(LuthierError, match="merged already"):
            tune.merge()
    finally:
        tune.unmerge()
    assert same(codes(model), before)
    assert all(torch.equal(now, then) for now, then in zip(outputs(model, IDS), unmerged, strict=True))


def test_expanding_and_putting_back() -> None:
    model = held("gpt2")
    before, modules = codes(model), quantized(model)
    state = torch.get_rng_state()
    replaced = expand(model, torch.float32)
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn for weights that are overwritten"
    assert codes(model).keys() == codes(tiny("gpt2", seed=1, layers=2)).keys()
    put(model, replaced)
    assert same(codes(model), before) and quantized(model) == modules


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(LuthierError, match="no quantization `nf5`"):
        load_model("tiny:llama", quantize="nf5")
    with pytest.raises(LuthierError, match="`quantize` is"):
        make_recipe({"model": "tiny:llama", "rows": {"train": []}, "quantize": "fp4"})
    with pytest.raises(LuthierError, match="not spread over processes"):
        make_recipe({"model": "tiny:llama", "rows": {"train": "x"}, "quantize": "nf4", "train": {"sharding": "full"}})
    from luthier.delta import Delta

    tune = tuned(held(), lora=lora())
    delta = Delta.of(tune)
    before = codes(tune.model)
    for change in (delta.apply, delta.remove):
        with pytest.raises(LuthierError, match="frozen in 4 bits") as refusal:
            change(tune.model)
        assert refusal.value.where in delta
    assert same(codes(tune.model), before)
